"""What an update of GRPO logs about its tokens: sums first, and means at its end."""

from machinery.ranks import gather


class TokenStatistics:
    """Sums over the policy's tokens of an update."""

    def __init__(self):
        self.tokens = 0
        self.loss = 0.0
        self.clipped = 0.0
        self.entropy = 0.0
        self.kl = None  # a number where there is a reference policy
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
        if losses.kl is not None:
            self.kl = (self.kl or 0.0) + losses.kl.detach().sum().item()

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
        sums_of_kl = [part.kl for part in ranks if part.kl is not None]
        if sums_of_kl:
            summary["kl"] = sum(sums_of_kl) / tokens
        return summary
