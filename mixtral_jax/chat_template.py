"""Chat templates of the user's own: Jinja, rendered in a sandbox in a process of its own.

A template is code from elsewhere. Jinja's immutable sandbox keeps it from Python's objects; a child
process with limits on time and memory, which can be killed, keeps it from the machine.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_jax.errors import BAD_DATA, MixtralError

if TYPE_CHECKING:
    from mixtral_jax.tokenizer import Tokenizer

MEMORY_BYTES = 256 * 2**20
LONGEST_TEXT = 16 * 2**20  # characters

# Starting Python on a busy machine does not count as rendering.
_START_SECONDS = 60.0
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mixtral_jax.chat_template import _child; _child(float(sys.argv[2]))"
)


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    timeout_seconds: float = 2.0,
) -> str:
    """Renders a chat template with the names and filters that transformers gives it.

    Args:
        template: Jinja source.
        messages: in OpenAI form; like ``tools``, handed to the template as JSON.
        bos_token: the spelling of <s>.
        eos_token: the spelling of </s>.
        tools: function definitions in OpenAI form.
        add_generation_prompt: handed to the template.
        timeout_seconds: the child is killed when rendering takes longer.

    Raises:
        MixtralError: exit code 65 where the template fails, refuses the messages, or wants more
            time or memory (``MEMORY_BYTES``, where the system enforces it) than it is given.
    """
    variables = {
        "messages": messages,
        "tools": tools,
        "documents": None,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        request = json.dumps({"template": template, "variables": variables}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _failed(f"messages and tools must be JSON: {error}", "use OpenAI form") from None
    search = json.dumps([path or os.getcwd() for path in sys.path])
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, search, repr(timeout_seconds)],
            input=request,
            capture_output=True,
            timeout=_START_SECONDS + timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _failed("rendering did not end", "simplify the template") from None
    if child.returncode in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        raise _failed(f"it ran longer than {timeout_seconds:g} s", "simplify the template")
    if child.returncode:
        reason = child.stderr.decode(errors="replace").strip().rpartition("\n")[2] or "no message"
        raise _failed(f"exit {child.returncode}, {reason}", "simplify the template")
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise _failed(answer["error"], "correct the template or the messages")
    return answer["text"]


def _failed(reason: str, fix: str) -> MixtralError:
    return MixtralError(f"chat template: {' '.join(reason.split())[:300]}", fix=fix, code=BAD_DATA)


def _child(timeout_seconds: float) -> None:
    """The other process: a request on stdin, ``{"text"}`` or ``{"error"}`` on stdout."""
    import jinja2.ext
    import jinja2.sandbox

    request = json.loads(sys.stdin.buffer.read())
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    _limit(timeout_seconds)
    try:
        text = environment.from_string(request["template"]).render(**request["variables"])
        if len(text) > LONGEST_TEXT:
            raise MemoryError
        answer = json.dumps({"text": text})
    except MemoryError:
        answer = json.dumps({"error": f"it wants more than {MEMORY_BYTES >> 20} MiB"})
    except Exception as error:
        # Whatever a template raises is its author's to read.
        answer = json.dumps({"error": f"{type(error).__name__}: {str(error)[:1000]}"})
    sys.stdout.write(answer)


def _limit(timeout_seconds: float) -> None:
    """From here on the kernel ends this process after the time, and refuses it more memory."""
    import resource

    seconds = math.ceil(timeout_seconds) + 1
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_CPU: seconds + math.ceil(sum(os.times()[:2])),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(name, (allowed, allowed))
        except (ValueError, OSError):
            continue  # macOS knows RLIMIT_AS but does not set it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGXCPU))
    signal.setitimer(signal.ITIMER_REAL, max(timeout_seconds, 1e-3))


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def chat_template_of(folder: str | Path, *, name: str = "default") -> str | None:
    """The chat template of a checkpoint folder, or None.

    ``chat_template.jinja`` comes first, then ``chat_template`` in tokenizer_config.json: a text, or
    a list of templates with names (the 8x22B release: default and tool_use).

    Raises:
        MixtralError: exit code 65 where the file cannot be read as such, or lacks ``name``.
    """
    folder = Path(folder)
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        if not path.is_file():
            return None
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MixtralError(f"{path} cannot be read: {error}", code=BAD_DATA) from None
    found = config.get("chat_template") if isinstance(config, dict) else config
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        by_name = {entry.get("name"): entry.get("template") for entry in found}
        found = by_name.get(name, f"none of that name, but {', '.join(map(str, by_name))}")
        if name not in by_name:
            raise MixtralError(f"{path} template {name}", expected="one", got=found, code=BAD_DATA)
    if found is None or isinstance(found, str):
        return found
    expected = "a text, or a list of names and templates"
    got = type(found).__name__
    raise MixtralError(f"{path} chat_template", expected=expected, got=got, code=BAD_DATA)


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered template, with exactly one <s> first, written or not.

    Control pieces in the text (``<s>``, ``</s>``; with v3 also ``[INST]`` and its kin) become
    their ids, whoever wrote them: a message that spells one is not told apart from the template.
    The text between two of them is encoded on its own; one space at its start is the one that
    SentencePiece adds, so ``<s> [INST]`` and ``<s>[INST]`` give the same ids.

    Raises:
        MixtralError: exit code 65 if the text cannot be held in UTF-8.
    """
    bos = re.escape(
        next(name for name, i in tokenizer.control_ids.items() if i == tokenizer.bos_id)
    )
    text = re.sub(rf"\A(?:\s*{bos})+", "", text)
    token_ids = [tokenizer.bos_id]
    for segment in tokenizer.control_pattern.split(text):
        if segment in tokenizer.control_ids:
            token_ids.append(tokenizer.control_ids[segment])
        else:
            token_ids += tokenizer.encode(segment.removeprefix(" "), bos=False)
    return token_ids
