"""What an update of GRPO logs about its tokens: sums first, and means at its end."""

from machinery.ranks import gather


class TokenStatistics:
    """Sums over the policy's tokens of an update."""

    def __init__(self, with_kl: bool):
        """with_kl: is there a reference policy?"""
        self.tokens = 0
        self.loss = 0.0
        self.clipped = 0.0
        self.entropy = 0.0
        self.kl = 0.0 if with_kl else None
        self.largest_gap = 0.0

    def add(self, loss, losses, entropies) -> None:
        """Add a chunk of n tokens: its loss (), its TokenLosses and entropies, (n,)."""
        self.loss += loss.item()
        if len(entropies) == 0:
            return
        self.tokens += len(entropies)
        self.clipped += losses.is_clipped.sum().item()
        self.entropy += entropies.sum().item()
        gap = losses.log_ratio.detach().abs().max().item()
        self.largest_gap = max(self.largest_gap, gap)
        if self.kl is not None:
            self.kl += losses.kl.detach().sum().item()

    def summary(self) -> dict[str, float]:
        """The loss, means over the tokens of all devices, and how many they are."""
        ranks = gather(self)
        tokens = max(sum(part.tokens for part in ranks), 1)
        summary = {
            "loss": sum(part.loss for part in ranks),
            "clip_frac": sum(part.clipped for part in ranks) / tokens,
            "entropy": sum(part.entropy for part in ranks) / tokens,
            "logprob_gap": max(part.largest_gap for part in ranks),
            "tokens_trained": sum(part.tokens for part in ranks),
        }
        if self.kl is not None:
            summary["kl"] = sum(part.kl for part in ranks) / tokens
        return summary
