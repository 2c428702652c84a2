"""The model repository: index, load, unload. Run after all others, since it takes a model away for a while."""

from __future__ import annotations

from tests.conformance.case import Server, case, check_sums, pair, refused, same

MODEL = "simple_again"


@case("simple")
def the_index(server: Server) -> None:
    """The index lists models with version and state."""
    found = {m.name: (m.version, m.state) for m in server.client.get_model_repository_index().models}
    same(found["simple"], ("1", "READY"))


@case(MODEL)
def unload_and_load(server: Server) -> None:
    """An unloaded model is not ready and answers nobody, until it is loaded again; others are not touched."""
    inputs, total, difference = pair()
    server.client.unload_model(MODEL)
    try:
        same(server.client.is_model_ready(MODEL), False)
        with refused("NOT_FOUND", "UNAVAILABLE"):
            server.client.infer(MODEL, inputs)
        check_sums(server.client.infer("simple", inputs), total, difference)
    finally:
        server.client.load_model(MODEL)
    same(server.client.is_model_ready(MODEL), True)
    check_sums(server.client.infer(MODEL, inputs), total, difference)


@case(MODEL)
def load_again(server: Server) -> None:
    """Loading what is loaded is no error."""
    server.client.load_model(MODEL)
    inputs, total, difference = pair()
    check_sums(server.client.infer(MODEL, inputs), total, difference)


@case()
def load_what_is_not_there(server: Server) -> None:
    """A model of which there is nothing is refused, and so are names that would leave the repository."""
    for name in ("no_such_model", "../simple", "/etc", ""):
        with refused("INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "FAILED_PRECONDITION"):
            server.client.load_model(name)
    same(server.client.is_server_live(), True)
