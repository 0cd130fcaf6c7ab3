"""Any network of Hugging Face's transformers that classifies sequences, from a configuration or with published weights.

The library is imported when a network of it is built: that takes five seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.errors import UserError, nearest, require
from kdbench.models.adopt import first_line
from kdbench.models.base import last_layer
from kdbench.types import Outputs

# Kinds whose answers are the same to rounding where a batch comes without what is padding in all of it: tested. Of
# others some are not, such as those with convolutions, which see that padding as texts.
ANY_LENGTH = ("bert", "distilbert", "roberta", "gpt2", "albert", "electra", "mpnet", "deberta-v2")
_SLIP = 0.85  # how alike a kind with a slip is to it (difflib's ratio); no network of huggingface.co is to its kind


def transformers_model(
    name: str,
    pretrained: bool = False,
    new_head: bool = False,
    attentions: bool = False,
    options: Mapping[str, object] | None = None,
    *,
    num_classes: int,
    vocab_size: int,
    length: int,
) -> Transformer:
    """A network of `AutoModelForSequenceClassification`, whose state_dict has the library's own keys below "net.".

    name: a kind ("bert", "distilbert", ...), whose sizes `options` sets, or a network of huggingface.co or in a folder,
    whose configuration (and, if `pretrained`, weights) is used; `new_head`: with a fresh classifier, which must be
    trained. A pretrained network must be given the ids of its own tokenizer (dataset.tokenizer=<name>). attentions:
    give them as features, too. Raises UserError for an unknown name, options that do not fit, a classifier of other
    classes, weights that cannot be had, and ids that the network does not know.
    """
    library = _library(name)
    config = _config(library, name, pretrained, {"num_labels": num_classes, **(options or {})}, vocab_size, length)
    shift = 1 if pretrained and config.pad_token_id != 0 else 0
    require(config.vocab_size >= vocab_size - shift, "name", name, f"a network that knows {vocab_size:,} token ids: "
            f"it knows {config.vocab_size:,}, those of dataset.tokenizer={name}")  # fmt: skip
    if config.pad_token_id is None:  # masked; the last one of a vocabulary stands in no text, or marks its end
        config.pad_token_id = config.vocab_size - 1
    kind = library.AutoModelForSequenceClassification
    extra = {"attn_implementation": "eager"} if attentions else {}
    with _readable(name, pretrained):
        if not pretrained:
            return Transformer(kind.from_config(config, **extra), shift, attentions)
        _refuse_head(library, name, num_classes, new_head)
        net = kind.from_pretrained(name, config=config, ignore_mismatched_sizes=new_head, **extra)
    return Transformer(net, shift, attentions)


class Transformer(nn.Module):
    """Token ids int64 [B, L], 0 = padding, which is masked -> `Outputs`.

    Features, 0 on padding: "embeddings" and the hidden states behind each layer, "stage1".."stageN", all
    [B, D, 1, L]; "attention1".."attentionN" [B, heads, L, L], if they are asked for; "pooled" [B, D], what the
    classifier reads. Networks that give no hidden states have only the last.
    """

    def __init__(self, net: nn.Module, shift: int, attentions: bool) -> None:
        super().__init__()
        self.net, self.shift, self.attentions = net, shift, attentions
        self.any_length = getattr(net.config, "model_type", "") in ANY_LENGTH
        self.padding = int(net.config.pad_token_id)  # type: ignore[union-attr, arg-type]

    def forward(self, inputs: Tensor) -> Outputs:
        here = inputs != 0
        ids = torch.where(here, inputs - self.shift, self.padding)
        read: list[Tensor] = []
        handle = last_layer(self).register_forward_pre_hook(lambda module, given: read.append(given[0]))
        try:
            out = self.net(
                input_ids=ids, attention_mask=here.long(), output_hidden_states=True, output_attentions=self.attentions
            )
        finally:
            handle.remove()
        features = self._features(out, here)
        if read:
            features["pooled"] = read[0] if read[0].dim() == 2 else _last(read[0], here)
        return Outputs(out.logits, features)

    def _features(self, out: Any, here: Tensor) -> dict[str, Tensor]:
        names = ["embeddings", *(f"stage{number}" for number in range(1, 1000))]
        states = [(state * here[:, :, None]).transpose(1, 2)[:, :, None] for state in out.get("hidden_states") or ()]
        features = dict(zip(names, states))
        for number, attention in enumerate((out.get("attentions") or ()) if self.attentions else (), start=1):
            features[f"attention{number}"] = attention * (here[:, None, :, None] & here[:, None, None])
        return features


def _last(states: Tensor, here: Tensor) -> Tensor:
    """Of [B, L, D] what stands at the last token that is no padding: what a causal network's classifier answers by."""
    place = (here.sum(1) - 1).clamp_min(0)
    return states.gather(1, place[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


def _config(library: Any, name: str, pretrained: bool, options: dict[str, object], vocab_size: int, length: int) -> Any:
    """The library's configuration; of a kind alone one for this vocabulary and length, with 0 as padding."""
    kinds = library.CONFIG_MAPPING
    if name in kinds:
        require(not pretrained, "pretrained", pretrained, f"false: {name} is a kind of network, without weights")
        fresh = {"vocab_size": vocab_size, "pad_token_id": 0, **options}
        known = set(kinds[name]().to_dict()) | set(getattr(kinds[name], "attribute_map", {}))
        _refuse_unknown(options, known | {"num_labels"})
        if "max_position_embeddings" in known:
            fresh.setdefault("max_position_embeddings", max(512, length + 2))
        with _readable(name, pretrained):
            return library.AutoConfig.for_model(name, **fresh)
    own = {} if pretrained else {"vocab_size": vocab_size}
    allowed = "a kind of network (bert, distilbert, ...), or one that is in a folder or that huggingface.co has"
    slip = [] if "/" in name or os.path.isdir(name) else get_close_matches(name, kinds, n=1, cutoff=_SLIP)
    if slip:  # not looked for on a network, which takes half a minute where there is none
        raise UserError("name", name, allowed, hint=f"Did you mean {slip[0]}?")
    try:
        config = library.AutoConfig.from_pretrained(name, **own, **options)
    except (OSError, ValueError) as error:
        raise UserError("name", name, allowed, hint=nearest(name, kinds) or first_line(error)) from error
    longest = getattr(config, "max_position_embeddings", None) or length
    require(length <= longest, "name", name, f"a network for {length} tokens: it reads {longest} (dataset.length)")
    return config


def _refuse_unknown(options: Mapping[str, object], known: set[str]) -> None:
    for key in options:
        if key not in known:
            raise UserError(f"options.{key}", said=f"this kind of network has no such option. {nearest(key, known)}")


def _refuse_head(library: Any, name: str, num_classes: int, new_head: bool) -> None:
    """Raise a UserError for a classifier of other classes, or none, where it is not to be replaced."""
    if new_head:
        return
    own = library.AutoConfig.from_pretrained(name)
    classifies = any("SequenceClassification" in word for word in own.architectures or ())
    if not classifies or own.num_labels != num_classes:
        has = f"{own.num_labels} classes" if classifies else "none"
        raise UserError("new_head", False, f"true: the classifier of {name} has {has}, the data {num_classes}")


@contextmanager
def _readable(name: str, pretrained: bool) -> Iterator[None]:
    """What the library raises in here is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # downloads, files and impossible sizes fail in many ways
        reason = f"{type(error).__name__}: {first_line(error)}"
        if pretrained:
            raise UserError("pretrained", said=f"the weights of {name} could not be loaded ({reason})") from error
        raise UserError("options", said=f"they do not fit {name}: {reason}") from error


def _library(name: str) -> Any:
    try:
        import transformers
        from transformers import masking_utils
    except ImportError as error:
        version = "" if sys.version_info >= (3, 11) else " and Python 3.11 or newer, which transformers wants"
        needs = f"a network of kdbench's own: those of transformers take pip install 'kdbench[text]'{version}"
        raise UserError("name", name, needs) from error
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for shortcut in ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa"):
        if hasattr(masking_utils, shortcut):
            setattr(masking_utils, shortcut, _never)
    return transformers


def _never(*given: Any, **named: Any) -> bool:
    """Instead of leaving masks out where a batch has no padding: that looks at the batch on the host in every pass, and
    makes the last bit of an answer depend on the other texts of the batch, which no table of answers could hold."""
    return False


def transformers_lm(
    name: str,
    pretrained: bool = False,
    options: Mapping[str, object] | None = None,
    *,
    num_classes: int,
    context: int,
    predicted: int,
) -> CausalTransformer:
    """A network of `AutoModelForCausalLM`, with the library's own keys below "net.".

    name: a kind ("gpt2", "llama", ...), whose sizes `options` sets, or a network of huggingface.co or in a folder,
    whose configuration (and, if `pretrained`, weights) is used. A pretrained network must be given the ids of its own
    tokenizer (dataset.tokenizer=<name>). Raises UserError as `transformers_model` does.
    """
    library = _library(name)
    config = _config(library, name, pretrained, dict(options or {}), num_classes, context + predicted)
    shift = 1 if pretrained and config.pad_token_id != 0 else 0
    fits = config.vocab_size == num_classes - shift
    require(fits, "name", name, f"a network of {num_classes - shift:,} tokens: it has {config.vocab_size:,}; those of "
            f"dataset.tokenizer={name}")  # fmt: skip
    with _readable(name, pretrained):
        kind = library.AutoModelForCausalLM
        net = kind.from_pretrained(name, config=config) if pretrained else kind.from_config(config)
    return CausalTransformer(net, shift, predicted)


class CausalTransformer(nn.Module):
    """Blocks of text, token ids int64 [B, L] -> `Outputs` for the last `predicted` tokens: logits [B predicted, C],
    features "embeddings" and "stage1".."stageN" [B predicted, D], and "pooled", what the last layer reads.

    Padding stands before the beginning of a text alone; it is read as a token of its own, as what ends texts where the
    network's own ids have none for it.
    """

    def __init__(self, net: nn.Module, shift: int, predicted: int) -> None:
        super().__init__()
        self.net, self.shift, self.predicted = net, shift, predicted
        config: Any = net.config
        ends = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        self.start = min(ends or 0, config.vocab_size - 1) if shift else 0

    def forward(self, inputs: Tensor) -> Outputs:
        ids = torch.where(inputs == 0, self.start, inputs - self.shift)
        # All of it is read; the library looks at the numbers of a batch that comes without a mask.
        out = self.net(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
        states = [state[:, -self.predicted :].flatten(0, 1) for state in out.hidden_states]
        names = ["embeddings", *(f"stage{number}" for number in range(1, len(states)))]
        logits = out.logits[:, -self.predicted :].flatten(0, 1)
        if self.shift:  # padding is never said
            logits = F.pad(logits, (self.shift, 0), value=-100.0)
        return Outputs(logits, {**dict(zip(names, states)), "pooled": states[-1]})
