"""The result of `popsd doctor --run` as text, as JSON and as an exit status."""

from __future__ import annotations

import json

from nemo_popsd.doctor.post_mortem import PostMortem, facts, shown_path

_HEADINGS = {
    "finished": "is finished",
    "running": "goes on",
    "stopped": "was stopped and has saved",
    "dead": "ended without finishing",
}


def exit_status(result: PostMortem) -> int:
    """1 for a run that ended without finishing, else 0."""
    return int(result.state == "dead")


def as_text(result: PostMortem) -> str:
    """State and facts, followed by the causes with evidence and a command each."""
    output = result.remains.output
    known = list(facts(result.remains))
    width = max(len(name) for name, _ in known)
    lines = [f"{output}: {_HEADINGS[result.state]}", *(f"  {name.ljust(width)}  {text}" for name, text in known)]
    if result.state == "dead":
        lines += ["", "What probably happened, the most probable first"]
    for number, cause in enumerate(result.causes, start=1):
        lines.append(f"{number}. {cause.likelihood}: {cause.what}" if result.state == "dead" else cause.what)
        lines += [f"     {shown_path(line, output)}  {line.text}" for line in cause.evidence]
        lines.append(f"     next: {cause.next}")
    return "\n".join(lines)


def as_json(result: PostMortem) -> str:
    """The same as an object: ``run``, ``state``, ``facts`` and ``causes``, with file, line and text of the evidence."""
    causes = [
        {
            "name": cause.name,
            "likelihood": cause.likelihood if result.state == "dead" else "certain",
            "what": cause.what,
            "evidence": [{"file": str(e.file), "line": e.number or None, "text": e.text} for e in cause.evidence],
            "next": cause.next,
        }
        for cause in result.causes
    ]
    content = {
        "run": str(result.remains.output),
        "state": result.state,
        "facts": dict(facts(result.remains)),
        "causes": causes,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)
