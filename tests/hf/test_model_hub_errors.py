"""What the Hub answers is passed on as advice; its answers are made up here, without any network."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lowmem.errors import RecipeError
from lowmem.hf.hub import hub_has_an_address
from lowmem.hf.loading_errors import explain
from lowmem.recipe.schema import ModelRecipe

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
RECIPE = ModelRecipe(name_or_path="org/model", revision="v9")


def as_transformers_raises_it(cause: Exception) -> OSError:
    try:
        try:
            raise cause
        except Exception as inner:
            raise OSError("org/model could not be opened. Several lines\nof advice follow.") from inner
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            GatedRepoError,
            "asks for its licence to be accepted on huggingface.co, and for a login: hf auth login",
        ),
        (RepositoryNotFoundError, "org/model is neither a folder here nor a model on huggingface.co"),
        (RevisionNotFoundError, "has no branch, tag or commit v9 (model.revision)"),
    ],
)
def test_each_answer_of_the_hub_has_its_own_advice(kind: type[Exception], expected: str) -> None:
    answer = kind.__new__(
        kind
    )  # its constructor wants the response of an HTTP client that differs by version
    error = explain(as_transformers_raises_it(answer), RECIPE, is_local=False)
    assert isinstance(error, RecipeError)
    assert expected in str(error)
    assert "\n" not in str(error)


def test_a_hub_model_with_pickles_only_is_refused() -> None:
    error = OSError(
        "org/model does not appear to have a file named model.safetensors and thus cannot be loaded"
    )
    assert "offers no safetensors weights" in str(explain(error, RECIPE, is_local=False))


def test_an_unforeseen_error_is_shown_on_one_line_with_its_kind() -> None:
    text = str(explain(KeyError("rope type"), RECIPE, is_local=True))
    assert text == "model.name_or_path: org/model cannot be loaded (KeyError: 'rope type')."


def test_the_hub_is_out_of_reach_when_its_name_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def no_address(*args: object) -> None:
        asked.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    for variable in PROXIES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    assert not hub_has_an_address()
    assert asked == [("huggingface.co", 443)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [])
    assert hub_has_an_address()


def test_behind_a_proxy_names_are_left_to_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: pytest.fail("asked for an address"))
    assert hub_has_an_address()
