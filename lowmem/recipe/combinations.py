"""Rules between keys, and files that a recipe names: what the type of a single key cannot say."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lowmem.recipe.half_life import GIVES_BETA2, WITHOUT_SECOND_MOMENT, with_second_moment
from lowmem.recipe.known_names import builtin_data_sets, chat_templates
from lowmem.recipe.node import Node
from lowmem.recipe.problems import Problems, shown
from lowmem.recipe.suggest import closest, did_you_mean

KINDS_OF_SOURCE = ("path", "hub", "builtin")
KEYS_OF_SOURCE = {
    "path": ("path", "format", "skip", "take"),
    "hub": ("hub", "name", "split", "format", "skip", "take"),
    "builtin": ("builtin", "split", "size", "skip", "take"),
}
BUILTIN_MODELS = ("builtin:tiny-llama",)


def check_combinations(root: Node, problems: Problems, *, files_must_exist: bool) -> None:
    """Adds a problem for every rule the recipe breaks. Values of a wrong type were reported before."""
    check_source("data.train", root, problems, files_must_exist)
    check_source("data.eval", root, problems, files_must_exist)
    check_evaluation(root, problems)
    check_model(root, problems, files_must_exist)
    check_template(root, problems, files_must_exist)
    merge = given(root, "save.merge_lora")
    if merge and merge.value is True and not given(root, "lora"):
        mend = "Add lora: {r: 16}, or delete save.merge_lora."
        problems.add(merge.place, f"save.merge_lora needs lora:, and there is none. {mend}")
    check_weights(root, problems)
    check_activation_offload(root, problems)
    check_half_life(root, problems)
    if files_must_exist:
        check_resume(root, problems)


def given(root: Node, dotted: str) -> Node | None:
    """The node of a key that is written and not null."""
    node: Node | None = root
    for name in dotted.split("."):
        if node is None or not isinstance(node.value, dict):
            return None
        node = node.value.get(name)
    return node if node is not None and node.value is not None else None


def check_weights(root: Node, problems: Problems) -> None:
    weights, lora, merge = (given(root, key) for key in ("model.weights", "lora", "save.merge_lora"))
    if weights is None or weights.value != "int8":
        for dotted in ("model.int8", "save.int8"):
            if (found := given(root, dotted)) and found.value is not False:
                message = f"{dotted} needs model.weights: int8, and the weights are not."
                problems.add(found.place, f"{message} Add model.weights: int8, or delete {dotted}.")
    if weights is None:
        return
    if weights.value == "nf4" and not lora:
        message = (
            "model.weights: nf4 needs lora:, and there is none: 4-bit codes are too coarse to be updated."
        )
        problems.add(weights.place, f"{message} Add lora: {{r: 16}}, or use model.weights: bf16.")
    if weights.value == "nf4" and merge and merge.value is True:
        message = "save.merge_lora would round the adapters into the 4-bit codes of model.weights: nf4."
        mend = "Delete save.merge_lora, and merge the saved adapters into the model in bfloat16."
        problems.add(merge.place, f"{message} {mend}")
    if weights.value == "int8" and lora:
        message = "model.weights: int8 is for training every parameter, and lora: trains adapters alone."
        problems.add(weights.place, f"{message} Use model.weights: nf4 or bf16.")


def check_activation_offload(root: Node, problems: Problems) -> None:
    offload, recomputed = (
        given(root, "train.activation_offload"),
        given(root, "train.activation_checkpointing"),
    )
    if offload and offload.value is True and not (recomputed and recomputed.value is True):
        message = "train.activation_offload moves what activation checkpointing keeps, and that is off."
        mend = "Add train.activation_checkpointing: true, or delete train.activation_offload."
        problems.add(offload.place, f"{message} {mend}")


def check_half_life(root: Node, problems: Problems) -> None:
    half_life, name = given(root, "optimizer.beta2_half_life_tokens"), given(root, "optimizer.name")
    if half_life is None or name is None or not isinstance(name.value, str):
        return
    for key in GIVES_BETA2:
        if given(root, f"optimizer.{key}") and name.value not in WITHOUT_SECOND_MOMENT:
            message = f"optimizer.beta2_half_life_tokens gives beta2, and so does optimizer.{key}."
            problems.add(half_life.place, f"{message} Delete one of them.")
    others = [given(root, f"optimizer.{other}.name") for other in ("fallback", "head")]
    groups = given(root, "optimizer.groups")
    if groups and isinstance(groups.value, list):
        others += [given(group, "name") for group in groups.value]
    names = [name.value, *(other.value for other in others if other)]
    if not set(names) & set(with_second_moment()):
        message = f"optimizer.beta2_half_life_tokens is for a second moment, and {name.value} has none."
        problems.add(
            half_life.place, f"{message} Delete it, or use one of {', '.join(with_second_moment())}."
        )


def check_resume(root: Node, problems: Problems) -> None:
    resume = given(root, "resume")
    if resume is None or not isinstance(resume.value, str) or resume.value in ("auto", "never"):
        return
    if not os.path.isdir(resume.value):
        near = did_you_mean(resume.value, ["auto", "never"])
        allowed = "auto, never or a checkpoint folder that exists"
        problems.add(resume.place, f"resume is {resume.found()}; it must be {allowed}.{near}")


def check_source(dotted: str, root: Node, problems: Problems, files_must_exist: bool) -> None:
    source = given(root, dotted)
    if source is None or not isinstance(source.value, dict):
        return
    kinds = [kind for kind in KINDS_OF_SOURCE if given(source, kind)]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        mend = "Keep one." if kinds else "Add one, for example builtin: arithmetic."
        problems.add(source.place, f"{dotted} needs exactly one of path, hub, builtin; found {found}. {mend}")
        return
    kind = kinds[0]
    for key in ("name", "split", "format", "size"):
        extra = given(source, key)
        if extra and key not in KEYS_OF_SOURCE[kind]:
            problems.add(extra.place, f"{dotted}.{key} does not go with {kind}. Delete it.")
    if "format" in KEYS_OF_SOURCE[kind] and not given(source, "format"):
        formats = "alpaca, sharegpt, messages, prompt_response, text"
        message = f"{dotted}.format is missing; {kind} needs it. Add one of {formats} (lowmem ls formats)."
        problems.add(source.place, message)
    _check_rows(f"{dotted}.skip", given(source, "skip"), problems)
    _check_rows(f"{dotted}.take", given(source, "take"), problems)
    if kind == "builtin":
        _check_builtin(dotted, source, problems)
    path = given(source, "path")
    if path and isinstance(path.value, str) and files_must_exist:
        _check_file(f"{dotted}.path", path, problems)


def _check_builtin(dotted: str, source: Node, problems: Problems) -> None:
    name, split = source.value["builtin"], given(source, "split")
    if isinstance(name.value, str):
        _check_name(f"{dotted}.builtin", name, builtin_data_sets(), "data set", problems)
    if split and isinstance(split.value, str) and split.value not in ("train", "held_out"):
        near = did_you_mean(split.value, ["train", "held_out"])
        message = f"{dotted}.split is {split.found()}; with builtin it must be one of train, held_out.{near}"
        problems.add(split.place, message)


def _check_rows(dotted: str, count: Node | None, problems: Problems) -> None:
    if count and isinstance(count.value, float) and count.value > 1 and not count.value.is_integer():
        allowed = "a whole number of rows, or a fraction below 1"
        problems.add(count.place, f"{dotted} is {count.found()}; it must be {allowed}.")


def check_evaluation(root: Node, problems: Problems) -> None:
    wishes = {"eval.every": None, "eval.at_start": True, "eval.loss_only": False}
    for dotted, only_when in wishes.items():
        wish = given(root, dotted)
        if wish is None or (only_when is not None and wish.value is not only_when):
            continue
        if not given(root, "data.eval"):
            mend = f"Add data.eval, or delete {dotted}."
            problems.add(wish.place, f"{dotted}: {wish.text} needs data.eval, and there is none. {mend}")
    loss_only, form = given(root, "eval.loss_only"), given(root, "data.eval.format")
    if loss_only and loss_only.value is False and form and form.value == "text":
        message = "eval.loss_only: false generates answers, and data.eval.format: text has no questions."
        problems.add(loss_only.place, f"{message} Delete eval.loss_only.")


def check_model(root: Node, problems: Problems, files_must_exist: bool) -> None:
    name = given(root, "model.name_or_path")
    if name is None or not isinstance(name.value, str):
        return
    if name.value.startswith("builtin:"):
        if name.value not in BUILTIN_MODELS:
            known = ", ".join(BUILTIN_MODELS)
            message = f"model.name_or_path is {name.found()}; the built-in model is {known}."
            problems.add(name.place, message)
    elif files_must_exist and name.value.startswith(("/", "./", "../", "~")):
        if os.path.isfile(name.value):
            mend = "a file. Name the folder that holds config.json and the safetensors"
            problems.add(name.place, f"model.name_or_path is {name.found()}, {mend}.")
        elif not os.path.isdir(name.value):
            problems.add(name.place, f"model.name_or_path is {name.found()}, a folder that does not exist.")


def check_template(root: Node, problems: Problems, files_must_exist: bool) -> None:
    template = given(root, "data.template")
    if template is None or not isinstance(template.value, str) or template.value == "auto":
        return
    if template.value.endswith((".jinja", ".jinja2", ".j2")) or "/" in template.value:
        if files_must_exist:
            _check_file("data.template", template, problems)
        return
    known = {"auto": "", **chat_templates()}
    _check_name("data.template", template, known, "template (a file must end in .jinja)", problems)


def _check_name(dotted: str, node: Node, known: Mapping[str, str], noun: str, problems: Problems) -> None:
    if node.value not in known:
        hint = f"{did_you_mean(node.value, known)} Known: {', '.join(known)}."
        problems.add(node.place, f"{dotted} is {node.found()}, which is no {noun}.{hint}")


def _check_file(dotted: str, node: Node, problems: Problems) -> None:
    path = os.path.expanduser(node.value)
    if os.path.isdir(path):
        problems.add(node.place, f"{dotted} is {node.found()}, a folder. Name the file in it.")
    elif not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        beside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        near = closest(os.path.basename(path), beside, cutoff=0.7)
        hint = f" Did you mean {shown(os.path.join(os.path.dirname(node.value), near))}?" if near else ""
        if not hint and not os.path.isabs(path):
            hint = " Relative paths start at the folder you run lowmem in."
        problems.add(node.place, f"{dotted} is {node.found()}, a file that does not exist.{hint}")
