"""KServe's own REST client against a REST face: `python tests/conformance/kserve_rest.py http://HOST:PORT` in an environment that
has kserve and none of this project (`make kserve`): kserve pins packages that ours are newer than.

Needs the models of tests.conformance.models. Prints a line for each case, ends with status 1 where one fails.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferOutput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

ONE = np.arange(16, dtype=np.int32).reshape(1, 16)
TWO = np.full((1, 16), 2, np.int32)


def request(binary: bool, **parameters: Any) -> InferRequest:
    inputs = []
    for name, array in (("INPUT0", ONE), ("INPUT1", TWO)):
        given = InferInput(name=name, shape=list(array.shape), datatype="INT32")
        given.set_data_from_numpy(array, binary_data=binary)
        inputs.append(given)
    return InferRequest(model_name="simple", infer_inputs=inputs, request_id="an id", parameters=parameters)


def check(outputs: list[InferOutput]) -> None:
    found = {o.name: o.as_numpy() for o in outputs}
    assert np.array_equal(found["OUTPUT0"], ONE + TWO), found
    assert np.array_equal(found["OUTPUT1"], ONE - TWO), found


async def health(client: InferenceRESTClient, url: str) -> None:
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "simple")
    assert not await client.is_model_ready(url, "no_such_model")


async def json(client: InferenceRESTClient, url: str) -> None:
    answer = await client.infer(url, request(False), model_name="simple")
    check(answer.outputs)
    assert answer.id == "an id"


async def binary(client: InferenceRESTClient, url: str) -> None:
    check((await client.infer(url, request(True, binary_data_output=True), model_name="simple")).outputs)


async def outputs(client: InferenceRESTClient, url: str) -> None:
    asked = request(True)
    asked.request_outputs = [RequestedOutput("OUTPUT1", parameters={"binary_data": True})]
    answer = await client.infer(url, asked, model_name="simple")
    assert [o.name for o in answer.outputs] == ["OUTPUT1"]
    assert np.array_equal(answer.outputs[0].as_numpy(), ONE - TWO)


async def plain(client: InferenceRESTClient, url: str) -> None:
    """A dict in place of a request."""
    tensors = [
        {"name": n, "shape": [1, 16], "datatype": "INT32", "data": a.ravel().tolist()} for n, a in (("INPUT0", ONE), ("INPUT1", TWO))
    ]
    check((await client.infer(url, {"inputs": tensors}, model_name="simple")).outputs)


async def refused(client: InferenceRESTClient, url: str) -> None:
    try:
        await client.infer(url, request(False), model_name="no_such_model")
    except httpx.HTTPStatusError as e:
        said = e
    else:
        raise AssertionError("was answered")
    assert said.response.status_code == 404, said
    assert "no_such_model" in str(said), said


CASES: tuple[Callable[[InferenceRESTClient, str], Awaitable[None]], ...] = (health, json, binary, outputs, plain, refused)


async def main(url: str) -> int:
    failed = 0
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        for case in CASES:
            try:
                await case(client, url)
            except Exception as e:  # whatever a case raises is its finding
                failed += 1
                print(f"FAIL  {case.__name__}: {type(e).__name__}: {e}")
            else:
                print(f"PASS  {case.__name__}")
    print(f"kserve · {len(CASES) - failed} PASS · {failed} FAIL")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/conformance/kserve_rest.py http://HOST:PORT")
    sys.exit(asyncio.run(main(sys.argv[1])))
