"""What a person wrote about concepts: concept.yaml, and concepts.yaml or classes.json beside.

``concept.yaml`` lies in a concept's folder and wins over ``concepts.yaml`` beside the
folders, which wins over ``classes.json``. The two files beside map a concept's id to its
class noun, or to the same keys that ``concept.yaml`` has.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from components.ingest import store
from components.ingest.store import Entry
from model.errors import InputError

CONCEPT_FILE = "concept.yaml"
CONCEPTS_FILE = "concepts.yaml"
CLASSES_FILE = "classes.json"
BESIDE_FILES = (CLASSES_FILE, CONCEPTS_FILE)  # the later one wins
DEFAULT_TOKEN = "<new1>"
MAX_FILE_BYTES = 1 << 20
MAX_CAPTION = 500
_TOO_DEEP = "is nested too deeply: write one flat table"

_TOKEN = re.compile(r"<[a-z0-9][a-z0-9_-]{0,30}>")
_WORDS = re.compile(r"[^\W_][\w' -]{0,62}")
# Class nouns whose subjects get DreamBench's live-subject prompts unless `live` says.
_LIVE_NOUNS = {
    *("animal", "baby", "bear", "bird", "boy", "cat", "child", "cow", "dog", "duck", "fish"),
    *("fox", "girl", "hamster", "horse", "kitten", "man", "parrot", "person", "pet", "pig"),
    *("puppy", "rabbit", "sheep", "squirrel", "tiger", "turtle", "woman"),
}
_NOT_LIVE = {"stuffed", "plush", "toy", "plushie"}


@dataclass(frozen=True)
class Facts:
    """The facts of one concept, as far as they are written; see DESIGN.md "Concept"."""

    class_noun: str | None = None
    token: str = DEFAULT_TOKEN
    initializer: str | None = None
    live: bool | None = None
    captions: Mapping[str, str] = field(default_factory=dict)

    @property
    def initializer_word(self) -> str:
        """Return the word a token starts from: the given one, else the class noun's last."""
        return self.initializer or (self.class_noun or "").split()[-1]

    @property
    def is_live(self) -> bool:
        """Return whether the subject is a living being, as written or by its class noun."""
        if self.live is not None:
            return self.live
        words = (self.class_noun or "").lower().split()
        return bool(words) and words[-1] in _LIVE_NOUNS and not _NOT_LIVE & set(words)

    def problems(self, image_names: set[str], *, read: bool = True) -> list[str]:
        """Say what is missing, and which captions are of no image.

        Of facts that could not all be `read` nothing is missing.
        """
        found = []
        if self.class_noun is None and read:
            found.append(
                "the class noun is missing: write `class_noun: dog` into "
                f"{CONCEPT_FILE} beside the images, or the concept into {CONCEPTS_FILE} or "
                f"{CLASSES_FILE} beside the folders"
            )
        for name in self.captions:
            if name not in image_names:
                found.append(f"{CONCEPT_FILE}: has a caption for {name}, which is not there")
        return found


@dataclass(frozen=True)
class BesideFacts:
    """The facts in the files beside the folders, and what is wrong in them by concept."""

    by_id: Mapping[str, Facts] = field(default_factory=dict)
    listed: frozenset[str] = frozenset()  # ids of concepts.yaml: each must have its folder
    of_all: tuple[str, ...] = ()  # a file that can't be read concerns every concept
    of_one: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, concept_id: str) -> Facts:
        """Return what is written beside about a concept."""
        return self.by_id.get(concept_id, Facts())

    def problems_of(self, concept_id: str) -> list[str]:
        """Return the problems that concern a concept."""
        return [*self.of_all, *self.of_one.get(concept_id, ())]

    def only(self, concept_id: str) -> BesideFacts:
        """Return the same without the duty of other concepts to be there."""
        return replace(self, listed=self.listed & {concept_id})


def read_beside(entries: Sequence[Entry], cache: Path | None) -> BesideFacts:
    """Read classes.json and concepts.yaml among the files beside the concept folders."""
    by_id: dict[str, Facts] = {}
    of_all: list[str] = []
    of_one: dict[str, tuple[str, ...]] = {}
    listed: set[str] = set()
    by_name = {entry.name: entry for entry in entries}
    if "concepts.yml" in by_name:
        of_all.append(f"concepts.yml: is not read: rename it to {CONCEPTS_FILE}")
    for name in BESIDE_FILES:
        if name not in by_name:
            continue
        content = _read(by_name[name], cache)
        if isinstance(content, str):
            of_all.append(f"{name}: {content}")
            continue
        for concept_id, value in content.items():
            given = {"class_noun": value} if isinstance(value, str) else value
            facts, problems = _merge(by_id.get(concept_id, Facts()), given, f"{name}: {concept_id}")
            by_id[concept_id] = facts
            if problems:
                of_one[concept_id] = (*of_one.get(concept_id, ()), *problems)
            if name == CONCEPTS_FILE:
                listed.add(concept_id)
    return BesideFacts(by_id, frozenset(listed), tuple(of_all), of_one)


def read_own(entry: Entry, facts: Facts, cache: Path | None) -> tuple[Facts, list[str]]:
    """Read a concept's own concept.yaml over the facts known so far."""
    content = _read(entry, cache)
    if isinstance(content, str):
        return facts, [f"{entry.name}: {content}"]
    return _merge(facts, content, entry.name)


def _merge(facts: Facts, given: Any, where: str) -> tuple[Facts, list[str]]:
    """Return facts with the given keys put in, and a sentence for each that is wrong."""
    if not isinstance(given, dict):
        return facts, [f"{where}: must be a table of keys such as `class_noun: dog`"]
    good: dict[str, Any] = {}
    problems = []
    for key, value in given.items():
        wrong = _wrong(key, value)
        if wrong:
            problems.append(f"{where}: {wrong}")
        else:
            good[key] = value.strip() if isinstance(value, str) else value
    return replace(facts, **good), problems


def _wrong(key: object, value: Any) -> str:
    """Say what is wrong with one key and its value ("" when nothing is)."""
    if key == "class_noun" or key == "initializer":
        if not isinstance(value, str):
            return f"`{key}` must be text such as `dog`, not {_shown(value)}"
        if not _WORDS.fullmatch(value.strip()):
            return f"`{key}` must be ordinary words of at most 63 letters, not {_shown(value)}"
        return ""
    if key == "token":
        if not isinstance(value, str) or not _TOKEN.fullmatch(value.strip()):
            return (
                f"`token` must look like {DEFAULT_TOKEN} (a-z, 0-9, _ and - between < and >), "
                f"not {_shown(value)}"
            )
        return ""
    if key == "live":
        return "" if isinstance(value, bool) else f"`live` must be true or false, not {value!r}"
    if key == "captions":
        return _wrong_captions(value)
    known = [item.name for item in fields(Facts)]
    near = difflib.get_close_matches(str(key), known, 1)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys are {', '.join(known)}"
    return f"unknown key {_shown(key)}: {hint}"


def _wrong_captions(value: Any) -> str:
    if not isinstance(value, dict):
        return "`captions` must be a table of image file names and texts"
    for name, caption in value.items():
        if not isinstance(name, str) or not isinstance(caption, str):
            return f"the caption of {_shown(name)} must be text"
        if not caption.strip() or len(caption) > MAX_CAPTION or not caption.isprintable():
            return f"the caption of {name} must be one line of 1 to {MAX_CAPTION} characters"
    return ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read(entry: Entry, cache: Path | None) -> dict[str, Any] | str:
    """Return a file's table, or what is wrong with the file."""
    if entry.refusal:
        return entry.refusal
    if entry.size > MAX_FILE_BYTES:
        return f"is over {MAX_FILE_BYTES >> 20} MiB: it can't be a table of concepts"
    try:
        text = store.fetch(entry, cache).read_text(encoding="utf-8-sig")
        content = _parse_json(text) if entry.name.endswith(".json") else _parse_yaml(text)
    except InputError as error:
        return str(error)
    except (OSError, UnicodeDecodeError) as error:
        return f"can't be read as UTF-8 text: {error}"
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return "must be a table with text keys, such as `class_noun: dog`"
    return content


def _parse_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise InputError(f"names {repeated!r} twice: remove one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno} is not JSON ({error.msg}): correct it") from error
    except RecursionError as error:
        raise InputError(_TOO_DEEP) from error


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (they can blow up) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise InputError(f"line {line} uses an alias (*name): write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(f"line {line} names {key.value!r} again: remove one")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
        return {} if content is None else content
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark is not None else "the text"
        reason = getattr(error, "problem", None) or "unreadable"
        raise InputError(f"{line} is not YAML ({reason}): correct it") from error
    except RecursionError as error:
        raise InputError(_TOO_DEEP) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"is not a plain table ({error}): correct it") from error
