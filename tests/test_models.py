"""machinery/models.py: a model that is not whole, or not exact, is refused in one line.
Other families of models, and their tokenizers, are tested in test_families.py."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from machinery.errors import BadInput
from machinery.models import (
    check_name,
    check_tokenizer,
    check_training,
    choose_template,
    fuse_norms,
    load_model,
    read_model,
    refusing,
    save_model,
    write_date,
)
from machinery.run import Run
from rollout import context_length, rollout
from tools.start import make_start
from train import Config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
DOGE = {**SIZES, "keep_window_size": 600}  # beyond the 400 tokens of the probe
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 60}
SOFT_CAPPED = {
    **SIZES,
    "head_dim": 8,
    "layer_types": ["full_attention"] * 2,
    "final_logit_softcapping": 0.5,
}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_norms_of_torch_give_the_same_digits_and_gradients(small_model, kind):
    more = {"sliding_window": None} if kind == "mistral" else {}
    model = small_model(kind, num_key_value_heads=2, **more)
    for weight in model.parameters():  # those of norms begin as ones
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    ids = torch.arange(60).reshape(3, 20)

    def digits():
        model.zero_grad()
        logits = model(ids).logits  # (3, 20, V)
        logits.log_softmax(-1)[..., 0].sum().backward()
        return [logits.detach()] + [weight.grad for weight in model.parameters()]

    before = digits()
    names = list(model.state_dict())
    fuse_norms(model)
    assert isinstance(model.model.norm, torch.nn.RMSNorm)
    assert list(model.state_dict()) == names
    for expected, value in zip(before, digits(), strict=True):
        assert torch.equal(expected, value)


def test_other_norms_stay(small_model):
    """Gemma's weight counts from 1, and Qwen3 has norms of single heads."""
    gemma = small_model("gemma", num_key_value_heads=2, head_dim=8)
    kind = type(gemma.model.norm)
    fuse_norms(gemma)
    assert type(gemma.model.norm) is kind
    qwen = small_model("qwen3", num_key_value_heads=2, head_dim=8)
    fuse_norms(qwen)
    assert not isinstance(qwen.model.layers[0].self_attn.q_norm, torch.nn.RMSNorm)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """folder(kind, **config): a random model of this family, with micro's tokenizer."""

    def make(kind="llama", **settings):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, vocab_size=len(tokenizer), **(settings or SIZES)
        )
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        path = tmp_path / kind
        save_model(AutoModelForCausalLM.from_config(config), tokenizer, path)
        return path

    return make


def change_config(path, **settings):
    """Change settings in the config.json of a model's folder."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    config.update(settings)
    file.write_text(json.dumps(config))


def refusal(path):
    """The line by which load_model refuses it."""
    with pytest.raises(BadInput) as error:
        load_model(str(path))
    line = str(error.value)
    assert line.startswith(f"cannot use {path}: ")
    assert len(line.splitlines()) == 1 and len(line) < 600
    return line


# ---------------------------------------------------------------- is it whole?


def test_weights_that_are_missing_are_refused_and_not_drawn(folder):
    path = folder()
    weights = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert f"lack 1 of the weights, or have them in another size, such as {name}" in (
        refusal(path)
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_hidden_layers": 3}, "lack 9 of the weights"),
        ({"hidden_size": 64}, "in another size, such as lm_head.weight"),
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"model_type": "t5"}, "Unrecognized configuration class"),  # names all others
        ({"max_position_embeddings": -1}, "it reads only -1 tokens at once"),
        ({"max_position_embeddings": 7}, "it reads only 7 tokens at once"),
    ],
)
def test_a_config_that_is_not_the_models_is_refused(folder, settings, reason):
    path = folder()
    change_config(path, **settings)
    assert reason in refusal(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("cut", [0, 50, 300])
def test_a_file_that_is_cut_off_is_refused(folder, name, cut):
    path = folder()
    file = path / name
    file.write_bytes(file.read_bytes()[:cut])
    refusal(path)


@pytest.mark.parametrize(
    "implementation", ["flash_attention_2", "kernels-community/flash-attn"]
)
def test_a_config_that_asks_for_flash_attention_is_taken(folder, implementation):
    """What is there computes the same."""
    path = folder()
    plain, _ = load_model(str(path))
    change_config(path, attn_implementation=implementation)
    model, _ = load_model(str(path))
    ids = torch.arange(50)[None]  # (1, S)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_eager_attention_stays_what_it_is(folder):
    path = folder()
    change_config(path, attn_implementation="eager")
    model, _ = load_model(str(path))
    assert model.config._attn_implementation == "eager"


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "runs/real/start",
        "./start",
        "../start",
        "/nowhere",
        "my model",
        "https://huggingface.co/owner/name",
        "README.md/",
        "",
        "a\0b",
        "\ud800",
    ],
)
def test_what_is_no_folder_and_no_name_of_the_hub_is_refused(name):
    with pytest.raises(BadInput, match="there is no such folder, and a model on"):
        check_name(name)


def test_the_refusal_names_the_command_that_makes_a_start():
    with pytest.raises(BadInput, match=r"^cannot use runs/real/start: ") as error:
        load_model("runs/real/start")
    assert "python -m tools.start --out runs/real/start" in str(error.value)


def test_folders_and_names_of_the_hub_may_be_asked_for(tmp_path):
    (tmp_path / "my model").mkdir()
    names = ["gpt2", "Qwen/Qwen2.5-0.5B", "owner/na_me-1.5", tmp_path / "my model"]
    for name in names:
        check_name(str(name))


# ---------------------------------------------------------------- its tokenizer


@pytest.fixture
def fresh(folder):
    """A small model's folder, and its tokenizer to be changed."""
    path = folder()
    return path, read_model(str(path))[1]


def test_of_several_chat_templates_the_default_one_is_taken(fresh):
    path, tokenizer = fresh
    (path / "chat_template.jinja").unlink()
    default = "{{ messages[0].content }}!"
    tokenizer.chat_template = {"tool_use": "{{ tools.x }}", "default": default}
    tokenizer.save_pretrained(path)
    _, loaded = load_model(str(path))
    assert loaded.chat_template == default


def test_without_a_default_template_it_is_refused(fresh):
    tokenizer = fresh[1]
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    message = "it has the chat templates tool_use, rag, and no default one"
    with pytest.raises(BadInput, match=message):
        choose_template(tokenizer)


@pytest.mark.parametrize("day", ["2026-13-45", "today", "\0"])
def test_a_date_that_is_none_is_refused(fresh, day):
    with pytest.raises(BadInput, match="a date is written as 2026-01-31, not"):
        write_date(fresh[1], day)


def word_tokenizer(*entries):
    """A tokenizer of whole words, which it writes with spaces between them."""
    entries = {entry: number for number, entry in enumerate(["<unk>", *entries])}
    backend = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>"
    )


@pytest.mark.parametrize(
    ("entries", "turn"),
    [
        (["<", "</", ">", "search", "answer", "Ada"], "< search > Ada </ search >"),
        (["Ada"], "<unk> <unk> <unk> Ada <unk> <unk> <unk>"),
    ],
)
def test_a_tokenizer_that_cannot_read_a_tag_is_refused(random_model, entries, turn):
    """Its turns would never end."""
    with pytest.raises(BadInput) as error:
        check_tokenizer(random_model, word_tokenizer(*entries))
    line = f"its tokenizer reads '<search> Ada </search>' as {turn!r}"
    assert str(error.value) == line


def test_both_kinds_of_turn_must_be_readable(random_model, fresh):
    """Here the tags of a search are special tokens, and those of an answer are not."""
    tokenizer = word_tokenizer("Ada", "<", "</", ">", "answer")
    tokenizer.add_tokens(["<search>", "</search>"], special_tokens=True)
    with pytest.raises(BadInput, match="reads '<answer> Ada </answer>' as '< answer"):
        check_tokenizer(random_model, tokenizer)
    tokenizer.add_tokens(["<answer>", "</answer>"], special_tokens=True)
    check_tokenizer(random_model, tokenizer)


# ---------------------------------------------------------------- is it exact?


def test_a_window_within_the_context_is_refused(folder):
    assert "a token must see all before it" in refusal(folder("doge", **DOGE))


def test_a_window_as_wide_as_the_context_is_taken(folder):
    path = folder("doge", **DOGE)
    for size in (1024, 0, -1):
        change_config(path, keep_window_size=size)
        if size == 1024:
            load_model(str(path))
    change_config(path, keep_window_size=1023)
    assert "a token must see all before it" in refusal(path)


def test_a_chunk_of_attention_is_a_window(folder):
    path = folder()
    change_config(path, attention_chunk_size=512)
    assert "a token must see all before it" in refusal(path)
    for harmless in (1024, 0, -1, None):
        change_config(path, attention_chunk_size=harmless)
        load_model(str(path))


def test_mpt_names_its_context_otherwise_and_no_rollout_exceeds_it(folder, three):
    model, tokenizer = load_model(str(folder("mpt", **MPT)))
    assert context_length(model) == 60
    trajectories = rollout(model, tokenizer, three, ["Who?"], group_size=8, seed=0)
    longest = max(len(each.prompt_ids + each.response_ids) for each in trajectories)
    assert longest == 60
    assert "context" in {each.finish_reason for each in trajectories}


def test_capped_logits_are_refused_on_the_cpu_before_the_model_moves(
    folder, monkeypatch
):
    """A GPU's bfloat16 would hide them."""
    path = folder("gemma2", **SOFT_CAPPED)
    load_model(str(path))  # it can be sampled
    monkeypatch.setattr("machinery.run.place_model", None)
    out = path.parent / "run"
    with pytest.raises(BadInput, match="cannot be trained like this: its prob"):
        Run(Config(model=str(path), out=str(out)))
    assert not out.exists()


def test_a_start_is_refused_before_its_demonstrations(folder, tmp_path, monkeypatch):
    """It would be lost: train.py refuses the same model afterwards."""
    path = folder("gemma2", **SOFT_CAPPED)
    monkeypatch.setattr("tools.start.write_demonstrations", None)
    with pytest.raises(BadInput, match=r"off by .* when it is trained"):
        make_start(
            str(path),
            "micro/train.jsonl",
            "micro/corpus.jsonl",
            tmp_path / "start",
            count=1,
            privileged=0,
            prompt="",
            batch=1,
            lr=1e-4,
            seed=0,
            k=1,
            max_searches=1,
            max_observation_tokens=60,
        )


def test_layers_that_are_not_told_from_the_output_layer_are_refused(random_model):
    """As Llama 4's: what should give hidden states gives logits."""
    check_training(random_model)
    type(random_model).base_model_prefix, kept = "", random_model.base_model_prefix
    try:
        with pytest.raises(BadInput, match="cannot be used without its output layer"):
            check_training(random_model)
    finally:
        type(random_model).base_model_prefix = kept


# ---------------------------------------------------------------- errors


def test_what_a_library_raises_is_one_line_and_what_we_raise_is_not():
    with (
        pytest.raises(BadInput, match=r"^cannot use it: Expecting value: line 1"),
        refusing("cannot use it"),
    ):
        json.loads("?")
    with (
        pytest.raises(BadInput, match=r"^cannot use it: no"),
        refusing("cannot use it"),
    ):
        raise BadInput("no")
    with pytest.raises(IndexError), refusing("cannot use it"):
        [].pop()  # a mistake in this repository


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full disk")
def test_no_room_for_the_tokenizer_is_one_line_and_the_old_model_stays(
    folder, tokenizer, random_model
):
    """The tokenizers library raises Exception itself."""
    path = folder()
    before = (path / "model.safetensors").read_bytes()
    new = path.with_name("llama.new")
    new.mkdir()
    (new / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(BadInput, match=f"^cannot write {new}: No space left on device"):
        save_model(random_model, tokenizer, path)
    assert (path / "model.safetensors").read_bytes() == before
    shutil.rmtree(new)
    save_model(random_model, tokenizer, path)
    assert (path / "model.safetensors").read_bytes() != before
    assert not new.exists()


def test_a_prompt_in_bytes_that_are_no_utf_8_can_be_kept(tmp_path):
    """As a shell may pass it on. It would be found out after the first test."""
    prompt = os.fsdecode(b"\xe9 {question}")
    run = Run(Config(out=str(tmp_path / "run"), prompt=prompt))
    save_model(run.model, run.tokenizer, tmp_path / "model")
    _, tokenizer = read_model(str(tmp_path / "model"))
    assert tokenizer.init_kwargs["search_prompt"] == "\ufffd {question}"
