"""Hydra's refusals in one message: what was typed, why it does not work, and what comes nearest."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from kdbench.arguments import locate, parameters
from kdbench.configure.check import OPTIONS, unresolved
from kdbench.configure.comments import of_option, usual
from kdbench.configure.loader import together
from kdbench.configure.options import folders, has_key, options
from kdbench.configure.text import quoted
from kdbench.errors import nearest
from kdbench.paths import CONFIG_DIR

_PLUGINS = {  # options that come with a package of their own
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
        "ray": "hydra-ray-launcher",
    },
    "hydra/sweeper": {"optuna": "hydra-optuna-sweeper"},
    "hydra/job_logging": {"colorlog": "hydra-colorlog"},
    "hydra/hydra_logging": {"colorlog": "hydra-colorlog"},
}
_NOISE = ("full_key:", "object_type=", "reference_type=", "See https", "Config search path", "\t")


# What other programs and papers call it.
_KEYS_ELSEWHERE = {
    "temperature": "tau", "T": "tau", "temp": "tau", "alpha": "loss.weights.distill",
    "learning_rate": "lr", "wd": "weight_decay",
    "bs": "batch_size", "batch": "batch_size", "epoch": "epochs", "n_epochs": "epochs", "num_epochs": "epochs",
    "model": "student", "network": "student", "net": "student", "arch": "student", "data": "dataset",
    "opt": "optimizer", "optim": "optimizer", "criterion": "loss", "augmentation": "augment", "amp": "precision",
    "distill": "loss", "method": "loss", "kd_T": "tau", "kd_temp": "tau", "num_workers": "workers",
    "teacher_model": "teacher", "student_model": "student", "model_s": "student", "model_t": "teacher",
    "path_t": "teacher.checkpoint", "learning_rates": "lr", "clip_grad": "clip", "model_ema_decay": "ema",
    "max_epochs": "epochs", "gpu": "device", "gpus": "device", "gpu_id": "device", "devices": "device",
    "accelerator": "device", "gradient_clip_val": "clip", "accumulate_grad_batches": "accumulate",
    "wandb": "logger=wandb", "use_wandb": "logger=wandb", "mlflow": "logger=mlflow", "exp_name": "name",
    "trial": "seed", "random_seed": "seed", "output_dir": "paths.outputs", "save_dir": "paths.outputs",
    "outputs": "paths.outputs", "data_dir": "dataset.root", "data_path": "dataset.root", "img_size": "size",
}  # fmt: skip
_OPTIONS_ELSEWHERE = {
    "loss": {
        "kd": "kl", "hinton": "kl", "vanilla": "kl", "kldiv": "kl", "cross_entropy": "ce", "crossentropy": "ce",
        "attention": "at", "hint": "fitnet", "hints": "fitnet", "l2": "mse", "jsd": "js",
    },
    "optimizer": {"adam": "timm optimizer.name=adam"},
    "schedule": {"cosine_annealing": "cosine", "multistep": "step"},
    "trainer.device": {"gpu": "cuda", **{str(number): f"cuda:{number}" for number in range(8)}},
}  # fmt: skip
_TYPED_GROUPS = ("schedule", "loss", "optimizer", "student", "dataset", "trainer", "procedure", "paths")


@dataclass
class _Line:
    """A command line taken apart."""

    overrides: list[Override]
    multirun: bool
    config_name: str
    places: list[Path]

    @property
    def search(self) -> list[str]:
        added = [quoted(f"file://{place.resolve()}") for place in self.places[1:]]
        return [f"hydra.searchpath=[{','.join(added)}]"] if added else []


def explain(error: Exception, arguments: Sequence[str], config_name: str = "train") -> str | None:
    """The message for what Hydra raised on this command line; None if it is no mistake of the user's."""
    if not isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)):
        return None
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    known, _ = get_args_parser().parse_known_args(list(arguments))
    try:
        overrides = OverridesParser.create().parse_overrides(known.overrides)
    except OverrideParseException as unreadable:
        return _unreadable(unreadable)
    line = _Line(overrides, known.multirun, known.config_name or config_name, folders(arguments))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
            found = _diagnose(line)
            if found is None and isinstance(error, InterpolationResolutionError):
                found = _unresolved(line, error)
    except Exception:  # the fault is not on the command line, but in a configuration file
        found = None
    finally:
        GlobalHydra.instance().clear()
    return found or _plain(error)


def _diagnose(line: _Line) -> str | None:
    usual: Mapping[str, object] = {}
    groups: list[list[str]] = []
    for parts in (False, True):  # loss@loss.parts.crd has its place where loss=sum is typed, too
        usual = _composed(line, [one[0] for one in groups]).hydra.runtime.choices
        for override in line.overrides:
            if (override.package is not None) != parts or not _is_group(override, usual, line):
                continue
            fault = _group_fault(override, usual, line)
            if fault:
                return fault
            groups.append(_spelled(override))
    if not line.multirun:
        several = next((o for o in line.overrides if o.is_sweep_override()), None)
        if several is not None:
            return _several(several)
    values = [o for o in line.overrides if not _is_group(o, usual, line)]
    for chosen in itertools.islice(itertools.product(*groups), 50):  # a key may exist in only some runs of a sweep
        cfg = _composed(line, chosen)
        fault = next(filter(None, (_key_fault(o, cfg, line.places) for o in values)), None)
        if fault:
            return fault
    return None


def _unresolved(line: _Line, error: OmegaConfBaseException) -> str:
    """A value that cannot be resolved (${oc.env:NAME}), by its key, also where it stands in a folder's path."""
    typed = [o.input_line for o in line.overrides if not o.is_sweep_override()]
    return unresolved(_composed(line, map(str, typed)), error)


def _composed(line: _Line, chosen: Iterable[str]) -> DictConfig:
    overrides = [*line.search, *filter(None, chosen)]
    return compose(line.config_name, overrides=overrides, return_hydra_config=True)


def _is_group(override: Override, usual: Mapping[str, object], line: _Line) -> bool:
    return override.key_or_group in usual or bool(_options(override.key_or_group, line))


def _options(group: str, line: _Line) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    return list(loader.get_group_options(group, config_name=line.config_name, overrides=line.search))


def _spelled(override: Override) -> list[str]:
    """The override of a group, one for each of its choices; "" for what takes the group away."""
    if override.is_delete() or (override.is_sweep_override() and not override.is_choice_sweep()):
        return [""]
    prefix = "+" if override.is_add() else ""
    return [f"{prefix}{override.get_key_element().lstrip('+')}={choice}" for choice in _choices(override)]


def _choices(override: Override) -> list[Any]:
    if override.is_choice_sweep():
        return list(override.sweep_string_iterator())
    return [] if override.is_sweep_override() else [override.value()]


def _group_fault(override: Override, usual: Mapping[str, object], line: _Line) -> str | None:
    group, typed = override.key_or_group, override.input_line
    key = override.get_key_element().lstrip("+~")
    names = _options(group, line)
    listing = _listing(group, names)
    if override.is_delete():
        return None if key in usual else f"{typed}: {key} is not in use, so it cannot be removed"
    if override.is_add() and key in usual:
        return f"{typed}: write it without the +: {str(typed).lstrip('+')}"
    if not override.is_add() and key not in usual:
        if key != group and names and any(value in names for value in _choices(override)):  # a place of its own
            whole = key.rpartition(".")[0]
            parts = "" if any(one.startswith(whole) for one in usual) else "; what has parts is loss=sum"
            return f"{typed}: add it with a +: +{str(typed).lstrip('+')}{parts if whole.endswith('.parts') else ''}"
        return f"{typed}: {key} is no choice of this command. {nearest(key, usual)}".rstrip()
    if override.is_sweep_override() and not line.multirun:
        return f"{typed}: several options for one run. To run each of them add -m{together(group)}"
    for value in _choices(override):
        if isinstance(value, (dict, list)) or value in names or (value is None and group in ("experiment", "debug")):
            continue
        if value in (None, ""):
            none = f" For none: {key}=none." if "none" in names else ""
            return f"{typed}: {key} needs one of its options.{none} {listing}"
        package = _PLUGINS.get(group, {}).get(str(value))
        if package:
            return f"{key}={value}: it comes with a package that is not installed: pip install {package}"
        hint = _other_name(group, key, str(value)) or nearest(str(value), names, f"Did you mean {key}={{}}? ")
        listing = _listing(group, names, brief=bool(hint))
        own = "" if hint or len(line.places) > 1 else ". One of your own needs --config-dir FOLDER"
        return f"{key}={value}: {group} has no option '{value}'. {hint}{listing}{own}"
    return None


def _other_name(group: str, key: str, value: str) -> str:
    """A hint for an option that the field, or a library of networks, knows under this name."""
    known = _OPTIONS_ELSEWHERE.get(group, {}).get(value.lower())
    if known:
        return f"Did you mean {key}={known}? "
    if group in ("teacher", "dataset") and {"/", "."} & {*value} and Path(value).exists():
        own = "run" if Path(value).is_dir() else "checkpoint"
        place = f"{key}.{own}" if group == "teacher" else f"{key}=text (or tensors, imagefolder) {key}.root"
        return f"Did you mean {place}={value}? "
    if group in ("student", "teacher") and re.fullmatch(r"[\w.]+", value):
        import timm  # only to explain: loads torch

        if timm.is_model(value):
            return f"It is a network of timm: {key}=timm {key}.name={value}. "
    return ""


def _listing(group: str, names: Sequence[str], brief: bool = False) -> str:
    if brief and len(names) > 12 and "hydra" not in group:
        return f"All {len(names)} options: kdbench list {group}"
    return f"Options of {group}: {', '.join(names) or 'none yet'}"


def _written(override: Override) -> str:
    """A value as it was typed, also several for a sweep."""
    return str(override.input_line).partition("=")[2]


def _several(override: Override) -> str:
    key = override.get_key_element()
    values = _written(override)
    return (
        f"{override.input_line}: several values for one run. To run each of them add -m; "
        f"for a list write '{key}=[{values}]', for text with commas \"{key}='{values}'\""
    )


def _key_fault(override: Override, cfg: DictConfig, places: Sequence[Path]) -> str | None:
    key, typed = override.key_or_group, override.input_line
    parts = key.split(".")
    depth = next((d for d in range(len(parts)) if not _has(cfg, parts[: d + 1])), len(parts))
    if override.package is not None:
        return f"{typed}: there is no group '{key}'. {nearest(key, cfg)}".rstrip()
    if depth == len(parts):
        return _existing_fault(override, cfg)
    if override.is_add() or override.is_force_add():
        return None
    owner = ".".join(parts[:depth])
    node = OmegaConf.select(cfg, owner) if owner else cfg
    if not isinstance(node, DictConfig):
        return f"{typed}: {owner} is a value and has no keys"
    return f"{typed}: {_unknown(parts, depth, cfg, places, override)}"


def _existing_fault(override: Override, cfg: DictConfig) -> str | None:
    """What is wrong with a value for a key that is there."""
    key, typed, value = override.key_or_group, override.input_line, override.value()
    if override.is_add() and not isinstance(value, (dict, list)):
        return f"{typed}: {key} exists; write it without the +: {str(typed).lstrip('+')}"
    node = OmegaConf.select(cfg, key)
    if override.is_add() or not isinstance(value, dict) or not isinstance(node, DictConfig):
        return None
    new = next((name for name in value if name not in node), None)
    if new is None:
        return None
    if not node:
        return f"{typed}: {key} has no key '{new}'. To add it: +{typed}"
    hint = nearest(str(new), [str(name) for name in node], "Did you mean {}? ")
    return f"{typed}: {key} has no key '{new}'. {hint}Keys of {key}: {', '.join(map(str, node))}"


def _has(cfg: DictConfig, parts: Sequence[str]) -> bool:
    node = OmegaConf.select(cfg, ".".join(parts[:-1])) if len(parts) > 1 else cfg
    return isinstance(node, DictConfig) and parts[-1] in node


def _unknown(parts: Sequence[str], depth: int, cfg: DictConfig, places: Sequence[Path], override: Override) -> str:
    """Why a key does not exist, and where one like it does."""
    owner, missing = ".".join(parts[:depth]), parts[depth]
    node = OmegaConf.select(cfg, owner) if owner else cfg
    group, choice = parts[0], cfg.hydra.runtime.choices.get(parts[0]) if parts[0] != "hydra" else None
    chosen = f"{group}={choice} has no key '{'.'.join(parts[1:])}'."
    words = [chosen if choice and depth else f"there is no key '{missing}'."]
    place = _where(missing, owner, cfg)
    if place:
        words.append(f"Did you mean {_assigned(place, _written(override))}?")
    names = options(group, places)
    if choice and _written(override) in names and len(parts) == 2:
        words.append(f"Did you mean {group}={_written(override)}?")
    holders = [name for name, file in names.items() if name != choice and has_key(file, parts[1:])] if depth else []
    keys = [str(key) for key in node if key != "_target_" and not (not owner and key == "hydra")]
    close = nearest(missing, keys, f"Did you mean {owner}.{{}}?" if owner else "Did you mean {}?")
    if close and not place:
        words.append(close)
    if holders:
        shown = ", ".join(f"{group}={name}" for name in holders[:5])
        words.append(f"It is a key of {shown}{' and others' if len(holders) > 5 else ''}.")
    elif owner in OPTIONS and missing in parameters(locate(OPTIONS[owner])):
        words.append(f"It can be added (+{override.input_line}).")
    elif depth and parts[depth - 1] == "weights" and missing in (OmegaConf.select(node, "..parts") or ()):
        words.append(f"It can be added (+{override.input_line}).")  # the weight of a part that was added to a sum
    elif owner and not keys:
        words.append(f"Keys of {owner} are added with a +: +{override.input_line}")
    if keys:
        words.append(f"Keys{f' of {owner}' if owner else ''}: {', '.join(keys)}")
    return " ".join(words)


def _place(name: str, cfg: DictConfig) -> str:
    """Where a key of this name is: the dotted key, that of the first group whose values are usually typed; or ""."""
    if "=" in name:  # a choice
        return name
    if name == "augment":
        return "dataset/augment"
    if name in cfg or OmegaConf.select(cfg, name, default=...) is not ...:
        return name
    owners = [name_of for name_of in _TYPED_GROUPS if name_of in cfg and isinstance(cfg._get_node(name_of), DictConfig)]
    return next((f"{owner}.{name}" for owner in owners if name in cfg[owner]), "")


def _where(name: str, owner: str, cfg: DictConfig) -> str:
    """Where a key that `owner` does not have is, in the words of other programs too: in it, below it, or elsewhere."""
    known = _KEYS_ELSEWHERE.get(name, name)
    if owner and known != name:
        own = f"{owner}.{known.removeprefix(f'{owner}.')}"
        if OmegaConf.select(cfg, own, default=...) is not ...:
            return own
    if owner == "teacher" and known in cfg.teacher.get("schedule", {}):
        return f"teacher.schedule.{known}"
    return "" if owner and owner not in _TYPED_GROUPS else _place(known, cfg)


def _assigned(place: str, value: str) -> str:
    return place if "=" in place else f"{place}={_OPTIONS_ELSEWHERE.get(place, {}).get(value.lower(), value)}"


def typed_as(flag: str, value: str) -> str:
    """What somebody who writes --lr 0.1 types here: schedule.lr=0.1; the words of other programs are understood."""
    name = flag.lstrip("-").replace("-", "_")
    if name in ("kd_model_name", "teacher_name"):  # timm
        return f"teacher=timm teacher.name={value}"
    name = _KEYS_ELSEWHERE.get(name, name)
    if name not in _TYPED_GROUPS and "." not in name and "=" not in name:
        chosen = usual([Path(CONFIG_DIR)])
        owners = [group for group in _TYPED_GROUPS if group in chosen]
        name = next((k for g in owners if (k := f"{g}.{name}") in of_option(g, chosen[g], [Path(CONFIG_DIR)])), name)
    return _assigned(name, value)


def _unreadable(error: OverrideParseException) -> str:
    typed = error.override
    if "=" not in typed and not typed.startswith("~"):
        return f"{typed}: not of the form key=value, e.g. loss=kl or loss.tau=4"
    return (
        f"{typed}: cannot be read as key=value. Lists are [1,2], mappings {{a: 1}}; text with spaces or any of "
        f"[]{{}}()=,: in it needs quotes inside quotes: \"key='some text'\""
    )


def _plain(error: Exception) -> str:
    """Hydra's own words for a fault in a configuration file, without its internals."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        listing = _listing(group, error.options, brief=True) if error.options else ""
        first_line = str(error).split("\n")[0]
        return " ".join(filter(None, [first_line, nearest(name, error.options or ()), listing]))
    root: BaseException = error
    while not str(root).strip() and root.__cause__ is not None:
        root = root.__cause__
    lines = [line for line in str(root).splitlines() if line.strip() and not line.strip().startswith(_NOISE[:-1])]
    cause = str(error.__cause__ or "").split("\n")[0]
    return "\n".join([*lines, *([cause] if cause and cause not in str(root) else [])]) or type(root).__name__
