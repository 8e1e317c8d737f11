"""What the router's list of models holds, beside what vLLM's own has."""

from runtime.router.front.cards import card, listing
from runtime.wire.routes import ModelRoute

ROUTE = ModelRoute(
    name="m", aliases=("org/m",), adapters=("m:sql",), root="org/base", max_model_len=4096
)


def test_every_name_is_an_entry_with_vllms_fields():
    cards = listing((ROUTE,), lambda names: True)["data"]
    assert [(c["id"], c["root"], c["parent"]) for c in cards] == [
        ("m", "org/base", None), ("org/m", "org/base", None), ("m:sql", "m:sql", "m"),
    ]  # fmt: skip
    assert all(c["max_model_len"] == 4096 for c in cards)
    assert all(c["permission"][0]["object"] == "model_permission" for c in cards)
    assert card(ROUTE, "org/m") == cards[1]


def test_a_model_that_is_not_of_the_hub_is_its_own_root():
    assert card(ModelRoute(name="m"), "m")["root"] == "m"


def test_only_what_the_caller_may_call_is_listed():
    cards = listing((ROUTE,), lambda names: "m:sql" in names)["data"]
    assert [c["id"] for c in cards] == ["m:sql"]
