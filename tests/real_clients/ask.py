"""Asks a server as its protocol's own client does; runs in an environment of clients, without ours.

python ask.py PROTOCOL ADDRESS OBSERVATIONS.npz ANSWERS.npy
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT = "pick up the can"
Act = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def openpi(address: str) -> Act:
    """openpi-client: a connection per episode, as it has no other reset."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    opened: dict[int, Any] = {}

    def act(episode: int, images: np.ndarray, state: np.ndarray) -> np.ndarray:
        if episode not in opened:
            opened[episode] = WebsocketClientPolicy(address)
            assert opened[episode].get_server_metadata()["server"] == "vla-pruner"
        sent = {
            "observation/image": images[0],
            "observation/wrist_image": images[1],
            "observation/state": state,
            "prompt": PROMPT,
        }
        reply = opened[episode].infer(sent)
        assert reply["server_timing"]["infer_ms"] > 0
        return reply["actions"]

    return act


def requests(address: str, form: str) -> Act:
    """requests and json_numpy, as OpenVLA's and OpenVLA-OFT's deploy scripts say."""
    import json_numpy
    import requests as library

    json_numpy.patch()
    session = library.Session()

    def act(episode: int, images: np.ndarray, state: np.ndarray) -> np.ndarray:
        sent = {
            "full_image" if form == "oft" else "image": images[0],
            "wrist_image": images[1],
            "state": state,
            "instruction": PROMPT,
            "session_id": f"{form}-{episode}",
        }
        if form == "encoded":
            sent = {"encoded": json_numpy.dumps(sent)}
        reply = session.post(address, json=sent)
        assert reply.status_code == 200, reply.text
        found = json_numpy.loads(reply.json()) if form == "encoded" else reply.json()
        return np.stack(found)

    return act


def gr00t(address: str) -> Act:
    """REQ, msgpack, arrays as numpy.save writes them; written from the protocol."""
    import msgpack
    import zmq

    socket = zmq.Context.instance().socket(zmq.REQ)
    socket.connect(address)
    now = [-1]

    def pack(value: Any) -> Any:
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": stream.getvalue()}

    def unpack(found: dict) -> Any:
        if "__ndarray_class__" in found:
            return np.load(io.BytesIO(found["as_npy"]), allow_pickle=False)
        return found

    def call(endpoint: str, data: Any) -> Any:
        socket.send(msgpack.packb({"endpoint": endpoint, "data": data}, default=pack))
        reply = msgpack.unpackb(socket.recv(), object_hook=unpack)
        assert "error" not in reply, reply
        return reply

    def act(episode: int, images: np.ndarray, state: np.ndarray) -> np.ndarray:
        if episode != now[0]:
            call("reset", {"options": None})
            now[0] = episode
        names = ("x", "y", "z", "roll", "pitch", "yaw")
        parts = {name: state[i : i + 1] for i, name in enumerate(names)} | {"gripper": state[6:]}
        observation = {
            "video": {"image": images[None, None, 0], "wrist_image": images[None, None, 1]},
            "state": {name: part[None, None].astype(np.float32) for name, part in parts.items()},
            "language": {"task": [[PROMPT]]},
        }
        actions, _ = call("get_action", {"observation": observation, "options": None})
        return np.concatenate([actions[name] for name in (*names, "gripper")], axis=2)[0]

    return act


def main(protocol: str, address: str, observations: str, answers: str) -> None:
    found = np.load(observations)
    name, _, form = protocol.partition("-")
    act = {"openpi": openpi, "gr00t": gr00t}.get(name, lambda a: requests(a, form))(address)
    rows = zip(found["episode"], found["images"], found["state"], strict=True)
    np.save(answers, np.stack([act(int(episode), *row) for episode, *row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
