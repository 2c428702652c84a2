"""Health, metadata, configuration, statistics and settings."""

from __future__ import annotations

from tests.conformance.case import Server, case, check_sums, pair, refused, same


@case()
def live_and_ready(server: Server) -> None:
    """A server that answers is live, and ready once its models are."""
    same(server.client.is_server_live(), True)
    same(server.client.is_server_ready(), True)


@case("simple")
def model_ready(server: Server) -> None:
    """A served model is ready, by name and by version; an unknown one is not, or is refused as unknown."""
    same(server.client.is_model_ready("simple"), True)
    same(server.client.is_model_ready("simple", "1"), True)
    same(server.client.is_model_ready("no_such_model"), False)
    same(server.client.is_model_ready("simple", "999"), False)


@case()
def server_metadata(server: Server) -> None:
    """The server has a name, a version, and lists its extensions."""
    found = server.client.get_server_metadata()
    if not (found.name and found.version and found.extensions):
        raise AssertionError(f"name, version or extensions are empty: {found}")


@case("simple")
def model_metadata(server: Server) -> None:
    """Inputs and outputs with datatype and shape, -1 where the batch varies, and the versions that are served."""
    found = server.client.get_model_metadata("simple")
    same((found.name, list(found.versions)), ("simple", ["1"]))
    same(sorted((t.name, t.datatype, tuple(t.shape)) for t in found.inputs), [(f"INPUT{i}", "INT32", (-1, 16)) for i in (0, 1)])
    same(sorted((t.name, t.datatype, tuple(t.shape)) for t in found.outputs), [(f"OUTPUT{i}", "INT32", (-1, 16)) for i in (0, 1)])


@case()
def metadata_of_an_unknown_model(server: Server) -> None:
    """Metadata and configuration of what is not served are refused as unknown."""
    with refused("NOT_FOUND"):
        server.client.get_model_metadata("no_such_model")
    with refused("NOT_FOUND"):
        server.client.get_model_config("no_such_model")


@case("simple")
def model_config(server: Server) -> None:
    """The configuration has the batch apart: max_batch_size above 0, dims without it, dynamic and no sequence batching."""
    found = server.client.get_model_config("simple").config
    same(found.name, "simple")
    same(found.max_batch_size > 0, True)
    same([list(t.dims) for t in (*found.input, *found.output)], [[16]] * 4)
    same(found.HasField("sequence_batching"), False)


@case("simple_sequence")
def sequence_model_config(server: Server) -> None:
    """A sequence model's configuration says so: it is how clients know."""
    same(server.client.get_model_config("simple_sequence").config.HasField("sequence_batching"), True)


@case("simple")
def statistics_count(server: Server) -> None:
    """Three requests, of five rows together, are three successes and five inferences more."""

    def now() -> tuple[int, int, int]:
        (found,) = server.client.get_inference_statistics("simple").model_stats
        same((found.name, found.version), ("simple", "1"))
        stages = [getattr(found.inference_stats, k).count for k in ("compute_input", "compute_infer", "compute_output")]
        same(len(set(stages)), 1)
        return found.inference_stats.success.count, found.inference_count, found.execution_count

    before = now()
    for rows in (1, 1, 3):
        server.client.infer("simple", pair(rows)[0])
    after = now()
    same((after[0] - before[0], after[1] - before[1]), (3, 5))
    same(1 <= after[2] - before[2] <= 3, True)


@case("simple")
def statistics_of_failures(server: Server) -> None:
    """A refused request is no success."""
    before = server.client.get_inference_statistics("simple").model_stats[0].inference_stats.success.count
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", pair()[0][:1])
    same(server.client.get_inference_statistics("simple").model_stats[0].inference_stats.success.count, before)


@case()
def statistics_of_all_models(server: Server) -> None:
    """Without a name, statistics are of every served model."""
    names = {m.name for m in server.client.get_inference_statistics().model_stats}
    index = {m.name for m in server.client.get_model_repository_index().models if m.state == "READY"}
    same(names, index)


@case("simple")
def trace_settings(server: Server) -> None:
    """Trace settings can be read, of the server and of a model."""
    same("trace_level" in server.client.get_trace_settings().settings, True)
    same("trace_level" in server.client.get_trace_settings("simple").settings, True)


@case()
def log_settings(server: Server) -> None:
    """Log settings can be read, set, and read back."""
    before = server.client.get_log_settings().settings["log_verbose_level"].uint32_param
    try:
        server.client.update_log_settings({"log_verbose_level": before + 1})
        same(server.client.get_log_settings().settings["log_verbose_level"].uint32_param, before + 1)
    finally:
        server.client.update_log_settings({"log_verbose_level": before})


@case("simple")
def still_serves(server: Server) -> None:
    """After all that, requests are answered."""
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs), total, difference)
