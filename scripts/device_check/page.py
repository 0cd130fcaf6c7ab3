"""What was found so far, as Markdown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

MARKS = {True: "ok", False: "**failed**", None: "n/a"}
FLAGS = {  # what may be relied on, or a flag of kdbench/engine/device.py: the sections that have checks of each
    "recorded steps": ("graphs", ("equal", "matrix", "losses")),
    "PROVEN_COMPILE": ("compile", ("compile",)),
}


def replace(file: Path, text: str) -> None:
    """Write a file that is whole at every moment: whoever writes it may be stopped."""
    made = file.with_name(f"{file.name}.new")
    made.write_text(text, encoding="utf-8")
    os.replace(made, file)


def justified(sections: dict[str, Any]) -> dict[str, str]:
    """What may be relied on, what the flags may be, and why. A section that did not end proves nothing."""
    verdicts = [verdict for section in sections.values() for verdict in section["verdicts"]]
    found = {}
    for constant, (flag, needed) in FLAGS.items():
        asked = [verdict for verdict in verdicts if verdict["flag"] == flag]
        bad = [verdict["name"] for verdict in asked if verdict["ok"] is False]
        untried = not asked or any(verdict["ok"] is None for verdict in asked)
        reasons = {
            "failed": bad,
            "did not end": [name for name in needed if name in sections and not _ended(name, sections[name])],
            "not run": [name for name in needed if name not in sections],
        }
        said = "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons.items() if names)
        said = "; ".join(filter(None, [said, "not tried on a GPU" if untried else ""]))
        found[constant] = f"False ({said})" if said else f"True ({len(asked)} checks passed)"
    return found | {"AUTO_PRECISION": _precision(sections)}


def _ended(name: str, section: dict[str, Any]) -> bool:
    """Whether a section's process came to its end: its supervisor has a verdict of that name if it did not."""
    return all(verdict["name"] != f"section {name}" for verdict in section["verdicts"])


def _precision(sections: dict[str, Any]) -> str:
    """That of the quickest recorded step, of those that keep three digits and more without a scale of the loss."""
    ways = sections.get("matrix", {}).get("figures", {}).get("ways", {})
    # kdbench does not search for kernels (cudnn.benchmark): the same run would not have the same numbers again.
    names = [name for name in ways if "graph" in name and not name.startswith("fp16") and "benchmark" not in name]
    recorded = {name: ways[name]["median"] for name in names}
    if not recorded:
        return "bf16 (not tried on a GPU)"
    best = min(recorded, key=recorded.__getitem__)
    return f"{best.partition(',')[0]} ({best}: {1e3 * recorded[best]:.3f} ms)"


def page(sections: dict[str, Any]) -> str:
    """In the order of the sections, the goals first; the flags last."""
    machine = next((s["machine"] for s in sections.values() if "machine" in s), {})
    lines = [f"# {machine.get('name')} ({machine.get('device')}), torch {machine.get('torch')}", ""]
    for name, section in sections.items():
        lines += [f"## {name} ({section['seconds']:.0f} s)", "", "| check | | detail |", "|---|---|---|"]
        lines += [f"| {v['name']} | {MARKS[v['ok']]} | {v['detail']} |" for v in section["verdicts"]]
        lines += [*_ways(section["figures"].get("ways", {})), *_kernels(section["figures"].get("top", [])), ""]
    lines += ["## What these results justify", ""]
    lines += [f"- `{constant} = {value}`" for constant, value in justified(sections).items()]
    return "\n".join(lines) + "\n"


def _ways(ways: dict[str, Any]) -> list[str]:
    if not ways:
        return []
    lines = ["", "| way to run a step | ms | quartiles | n |", "|---|--:|--:|--:|"]
    for way, step in sorted(ways.items(), key=lambda item: item[1]["median"]):
        low, high = 1e3 * step["low"], 1e3 * step["high"]
        lines.append(f"| {way} | {1e3 * step['median']:.3f} | {low:.3f} to {high:.3f} | {step['n']} |")
    return lines


def _kernels(top: list[Any]) -> list[str]:
    if not top:
        return []
    lines = ["", "| kernel | a step | us a step |", "|---|--:|--:|"]
    return lines + [f"| `{kernel}` | {count:.1f} | {us:.1f} |" for kernel, count, us in top]
