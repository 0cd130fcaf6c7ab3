"""What was found so far, as Markdown."""

from __future__ import annotations

from typing import Any

MARKS = {True: "ok", False: "**failed**", None: "n/a"}


def justified(sections: dict[str, Any]) -> dict[str, str]:
    """What the flags of kdbench/engine/device.py may be, and why."""
    verdicts = [verdict for section in sections.values() for verdict in section["verdicts"]]
    found = {}
    for flag, constant in (("graphs", "PROVEN_GRAPHS"), ("compile", "PROVEN_COMPILE")):
        asked = [verdict for verdict in verdicts if verdict["flag"] == flag]
        bad = [verdict["name"] for verdict in asked if verdict["ok"] is False]
        missing = [verdict["name"] for verdict in asked if verdict["ok"] is None]
        reason = f"failed: {', '.join(bad)}" if bad else "not tried on a GPU" if missing or not asked else ""
        found[constant] = f"False ({reason})" if reason else f"True ({len(asked)} checks passed)"
    return found | {"AUTO_PRECISION": _precision(sections)}


def _precision(sections: dict[str, Any]) -> str:
    """That of the quickest recorded step, of those that keep three digits and more without a scale of the loss."""
    ways = sections.get("matrix", {}).get("figures", {}).get("ways", {})
    recorded = {name: step["median"] for name, step in ways.items() if "graph" in name and not name.startswith("fp16")}
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
    lines += ["## Flags that these results justify", ""]
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
