"""lerobot's asynchronous door: its pickles as data, its order of calls, and attacks on both."""

from __future__ import annotations

import asyncio
import os
import pickle
import pickletools
import sys
import tempfile
import types
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc", reason="pip install 'vla-pruner[doors]'")

import grpc
import grpc.aio
import torch
from talking import ROBOT, STEPS, ask, near, seen

from vla_pruner.doors import lerobot_async
from vla_pruner.doors.door import Listen
from vla_pruner.doors.lerobot_async import SERVICE, LerobotDoor
from vla_pruner.doors.unpickle import fields, pickled_actions, unpickle
from vla_pruner.doors.wire import Bounds
from vla_pruner.serving.engine import Refused

HELPERS = "lerobot.async_inference.helpers"
JOINTS = [f"j{number}.pos" for number in range(8)]


@dataclass
class RemotePolicyConfig:
    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: dict[str, Any]
    actions_per_chunk: int
    device: str = "cpu"
    rename_map: dict[str, str] = field(default_factory=dict)


@dataclass
class TimedObservation:
    timestamp: float
    timestep: int
    observation: dict[str, Any]
    must_go: bool = False


@dataclass
class TimedAction:
    timestamp: float
    timestep: int
    action: Any


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pickles that name lerobot's classes, without lerobot."""
    for name in ("lerobot", "lerobot.async_inference", HELPERS):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for kind in (RemotePolicyConfig, TimedObservation, TimedAction):
        monkeypatch.setattr(kind, "__module__", HELPERS)
        setattr(sys.modules[HELPERS], kind.__name__, kind)
    yield


def observation(seed: int, step: int, must_go: bool = True, **more: Any) -> TimedObservation:
    row = seen(seed)
    raw: dict[str, Any] = dict(zip(JOINTS, map(float, row["proprio"]), strict=True))
    raw |= {"front": row["images"][0], "wrist": row["images"][1], "task": row["instruction"]}
    return TimedObservation(100.0 + step, step, raw | more, must_go)


def setup(**more: Any) -> RemotePolicyConfig:
    image = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": JOINTS},
        "observation.images.front": image,
        "observation.images.wrist": image,
    }
    told = {"lerobot_features": features, "actions_per_chunk": 3} | more
    return RemotePolicyConfig("smolvla", "some/where", **told)


# -- pickles ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_a_robot_sends_is_read(helpers: None, protocol: int) -> None:
    raw = {
        "joint": 1.5,
        "number": np.float32(2.5),
        "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "back": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[::-1],
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "tensor": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "part": torch.arange(6.0)[2:],
        "task": "pick",
    }
    sent = TimedObservation(1.25, 7, raw, True)
    told = fields(unpickle(pickle.dumps(sent, protocol=protocol)))
    assert (told["timestamp"], told["timestep"], told["must_go"]) == (1.25, 7, True)
    for name, value in raw.items():
        got = told["observation"][name]
        if isinstance(value, np.ndarray | torch.Tensor):
            assert isinstance(got, np.ndarray) and np.array_equal(got, np.asarray(value))
        else:
            assert got == value
    policy = fields(unpickle(pickle.dumps(setup(), protocol=protocol)))
    assert policy["lerobot_features"]["observation.state"]["names"] == JOINTS


def test_what_is_answered_is_lerobots_own(helpers: None) -> None:
    chunk = [{"timestamp": 1.5, "timestep": 3, "action": torch.arange(3.0) + n} for n in range(2)]
    found = pickle.loads(pickled_actions(chunk))
    assert [type(each) for each in found] == [TimedAction, TimedAction]
    assert [each.timestep for each in found] == [3, 3]
    assert torch.equal(found[1].action, torch.arange(3.0) + 1)


class Runs:
    """Pickled, it asks for a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


TOUCHED = str(Path(tempfile.gettempdir()) / "vla-pruner-was-here")
OPCODES = {
    "a name by parts": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
    "an old instance": b"(i__main__\nRuns\n.",
    "an old object": b"(cos\nsystem\nS'id'\no.",
    "extensions": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02K\x01Q.",
    "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "a method of ours": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
    "a base class": b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93)\x81\x8c\x09__class__K\x01s.",
    "a huge memo": b"\x80\x02Kar\xff\xff\xff\x7f.",
    "a huge claim": b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",
    "a huge buffer": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "a stack that is empty": b"\x80\x02R.",
    "two": pickle.dumps(1) + pickle.dumps(2),
    "a set": pickle.dumps({1, 2}),
    "complex": pickle.dumps(1j),
    "a key that is a number": pickle.dumps({1: 2}),
    "a huge number": pickle.dumps(10**5000),
    "objects": pickle.dumps(np.array([{}, None], dtype=object)),
    "records": pickle.dumps(np.zeros(2, dtype=[("a", "<f4")])),
    "a bytearray": pickle.dumps(bytearray(b"x"), protocol=5),
    "a key that takes 2 ** 60 steps to hash": b"\x80\x04})\x94"
    + b"".join(b"h%c\x86\x94" % number for number in range(60))
    + b"K\x01s.",
    "an instance as a key": b"\x80\x02}cnumpy\nndarray\n)\x81K\x01s.",
    "things left on the stack": b"\x80\x02K\x01K\x02.",
    "a mark that nothing takes": b"\x80\x02](.",
    "more than lies behind the mark": b"\x80\x02K\x01(\x85.",
    "a tuple that grows": b"\x80\x02)K\x01a.",
    "a state for a class": b"\x80\x02cnumpy\nndarray\n}b.",
    "a call of an instance": b"\x80\x02cnumpy\nndarray\n)\x81)R.",
    "a call with names": b"\x80\x04cnumpy\nndarray\n)}\x92.",
    "a protocol to come": b"\x80\xc8K\x01.",
}


@pytest.mark.parametrize("name", OPCODES)
def test_other_pickles_are_refused(name: str) -> None:
    with pytest.raises(Refused):
        unpickle(OPCODES[name])


@pytest.mark.parametrize(
    "call",
    [
        (os.system, f"touch {TOUCHED}"),
        (eval, f"open({TOUCHED!r}, 'w')"),
        (exec, "import os"),
        (getattr, "x", "upper"),
        (__import__, "os"),
        (np.load, TOUCHED),
        (torch.load, TOUCHED),
        (pickle.loads, b"x"),
        (print, "x"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_call_is_made(call: tuple[Any, ...], protocol: int, helpers: None) -> None:
    hidden = TimedObservation(1.0, 1, {"a": Runs(*call)})
    for sent in (Runs(*call), [Runs(*call)], hidden):
        with pytest.raises(Refused, match=r"admitted|instruction"):
            unpickle(pickle.dumps(sent, protocol=protocol))
    assert not os.path.exists(TOUCHED)


def test_a_tensor_hides_nothing(helpers: None) -> None:
    """torch's own reader of a tensor's bytes unpickles them."""
    inner = pickle.dumps(Runs(os.system, f"touch {TOUCHED}"), protocol=2)

    outer = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n"
    outer += b"B" + len(inner).to_bytes(4, "little") + inner
    outer += b"\x85RK\x00K\x01\x85K\x01\x85\x89NtR."
    assert [code.name for code, *_ in pickletools.genops(outer)][-1] == "STOP"
    with pytest.raises(Refused, match="storage is"):
        unpickle(outer)
    assert not os.path.exists(TOUCHED)


def tensor(told: bytes, size: Any = (1,), stride: Any = (1,), end: bytes = b"") -> bytes:
    """A pickled tensor whose storage holds the pickle `told` and ends as said."""
    stored = 3 * pickle.dumps(1) + told + pickle.dumps(1) + end
    name = b"\x80\x03ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n"
    inner = [pickle.dumps(value, 3)[2:-1] for value in ((stored,), 0, size, stride)]
    return name + inner[0] + b"R" + b"".join(inner[1:]) + b"tR."


FLOATS = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x00tQ."
ONE = (1).to_bytes(8, "little") + bytes(4)


@pytest.mark.parametrize(
    "damage",
    [
        {"told": b"\x80\x02)Q."},
        {"told": b"\x80\x02K\x01."},
        {"end": ONE[:3]},
        {"end": b"\xff" * 8},
        {"size": (1 << 2030,) * 3000, "stride": (1,) * 3000},
        {"size": "11", "stride": (1, 1)},
        {"size": (-1, -1), "stride": (1, 1)},
        {"size": (1.0,)},
        {"size": None},
        {"size": (2,)},
        {"stride": (1, 1)},
    ],
)
def test_a_tensor_that_is_damaged_is_refused(damage: dict[str, Any]) -> None:
    good: dict[str, Any] = {"told": FLOATS, "end": ONE}
    assert np.array_equal(unpickle(tensor(**good)), np.zeros(1, np.float32))
    with pytest.raises(Refused) as refused:
        unpickle(tensor(**{**good, **damage}))
    assert len(str(refused.value)) < 300


def test_shared_parts_cannot_multiply() -> None:
    value: list[Any] = ["x"]
    for _ in range(6):
        value = [value] * 40
    with pytest.raises(Refused, match="made of more than"):
        unpickle(pickle.dumps(value))
    image = np.zeros((1000, 1000), np.uint8)
    with pytest.raises(Refused, match="larger than the pickle"):
        unpickle(pickle.dumps([image] * 100))
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(Refused, match="nested deeper"):
        unpickle(pickle.dumps(loop))
    with pytest.raises(Refused, match="at most 1000"):
        unpickle(pickle.dumps(image), Bounds(message=1000))


def test_damage_is_refused(helpers: None) -> None:
    """Every byte of a good pickle changed: read as something harmless, or refused."""
    good = pickle.dumps(TimedObservation(1.0, 1, {"a": np.arange(4, dtype=np.uint8), "t": "x"}))
    random = np.random.default_rng(0)
    for place in range(len(good)):
        for byte in random.integers(0, 256, 6):
            bad = good[:place] + bytes([int(byte)]) + good[place + 1 :]
            try:
                unpickle(bad)
            except Refused as error:
                assert len(str(error)) < 500


# -- the protocol ----------------------------------------------------------------------------------
class Robot:
    """Calls as lerobot's client makes them."""

    def __init__(self, address: str) -> None:
        alone = [("grpc.use_local_subchannel_pool", 1)]  # as in a process of its own
        self.channel = grpc.aio.insecure_channel(address.split()[0], options=alone)

    async def call(self, name: str, data: bytes = b"") -> bytes:
        return await self.channel.unary_unary(f"/{SERVICE}/{name}")(data)

    async def begin(self, config: RemotePolicyConfig) -> None:
        await self.call("Ready")
        await self.call("SendPolicyInstructions", message(1, pickle.dumps(config)))

    async def show(self, sent: Any, size: int = 1000) -> None:
        data = sent if isinstance(sent, bytes) else pickle.dumps(sent)

        async def parts() -> AsyncIterator[bytes]:
            for at in range(0, len(data), size):
                state = 3 if at + size >= len(data) else 2 if at else 1
                yield bytes([8, state]) + message(2, data[at : at + size])

        await self.channel.stream_unary(f"/{SERVICE}/SendObservations")(parts())

    async def actions(self) -> list[TimedAction]:
        data = await self.call("GetActions")
        if not data:
            return []
        found: list[TimedAction] = pickle.loads(lerobot_async._data(data, 1))
        return found

    async def __aenter__(self) -> Robot:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()


def message(number: int, data: bytes) -> bytes:
    return lerobot_async._field(number << 3 | 2, data)


def door(idle_s: float = 300.0, **options: Any) -> Callable:
    return lambda engine: LerobotDoor(engine, Listen(idle_s=idle_s), ROBOT, **options)


def test_answers_are_those_of_the_policy_itself(
    helpers: None, served: Any, direct: Callable
) -> None:
    async def run(address: str) -> list[Any]:
        async with Robot(address) as robot:
            await robot.begin(setup())
            chunks = []
            for step, seed in enumerate(STEPS):
                await robot.show(observation(seed, step))
                chunks.append(await robot.actions())
            return chunks

    async def talk(address: str) -> Any:
        return await run(address), await run(address)

    first, second = ask(served, door(), talk)
    wanted = [chunk[:3] for chunk in direct(STEPS)]
    for chunks in (first, second):  # a new connection is a new episode
        assert near([np.stack([a.action.numpy() for a in chunk]) for chunk in chunks], wanted)
    assert [a.timestep for a in first[2]] == [2, 3, 4]
    assert [a.timestamp for a in first[2]] == pytest.approx([102 + n / 30 for n in range(3)])


def test_the_newest_observation_wins_and_still_joints_are_skipped(
    helpers: None, served: Any, direct: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_async, "WAIT_S", 0.05)

    async def talk(address: str) -> Any:
        async with Robot(address) as robot:
            await robot.begin(setup())
            assert await robot.actions() == []
            await robot.show(observation(9, 0))
            await robot.show(observation(1, 1))
            first = await robot.actions()
            await robot.show(observation(2, 1, must_go=False))  # predicted already
            await robot.show(observation(1, 2, must_go=False))  # joints as they were
            nothing = await robot.actions()
            far = {name: 5.0 for name in JOINTS}
            await robot.show(observation(1, 3, must_go=False, **far))
            return first, nothing, await robot.actions()

    first, nothing, moved = ask(served, door(), talk)
    assert near([np.stack([a.action.numpy() for a in first])], [direct([1])[0][:3]])
    assert nothing == [] and [a.timestep for a in moved] == [3, 4, 5]


def test_cameras_are_named_or_counted(helpers: None, served: Any, direct: Callable) -> None:
    swapped = {"cameras": ("wrist", "front")}

    async def talk(address: str) -> Any:
        async with Robot(address) as robot:
            await robot.begin(setup())
            row = observation(1, 0)
            row.observation["front"], row.observation["wrist"] = (
                row.observation["wrist"],
                row.observation["front"],
            )
            await robot.show(row)
            return await robot.actions()

    chunk = ask(served, door(**swapped), talk)
    assert near([np.stack([a.action.numpy() for a in chunk])], [direct([1])[0][:3]])
    with pytest.raises(ValueError, match="--cameras names 1"):
        door(cameras=("front",))(None)
    with pytest.raises(ValueError, match="cannot show a token"):
        LerobotDoor(None, Listen(token="t" * 20), ROBOT)  # type: ignore[arg-type]


def test_wrong_calls_are_errors_for_their_client(helpers: None, served: Any) -> None:
    one = setup()
    del one.lerobot_features["observation.images.wrist"]

    async def fails(robot: Robot, call: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        return str(error.value.details())

    async def talk(address: str) -> list[str]:
        async with Robot(address) as other, Robot(address) as robot:
            await other.begin(setup())
            said = [await fails(robot, robot.call("GetActions"))]
            await robot.call("Ready")
            said.append(await fails(robot, robot.call("GetActions")))
            for config in (one, setup(actions_per_chunk=0), setup(rename_map={"a": "b"})):
                sent = message(1, pickle.dumps(config))
                said.append(await fails(robot, robot.call("SendPolicyInstructions", sent)))
            said.append(await fails(robot, robot.call("SendPolicyInstructions", b"\xff" * 20)))
            evil = message(1, pickle.dumps(Runs(os.system, f"touch {TOUCHED}")))
            said.append(await fails(robot, robot.call("SendPolicyInstructions", evil)))
            await robot.begin(setup())
            said.append(await fails(robot, robot.show(Runs(os.system, f"touch {TOUCHED}"))))
            said.append(await fails(robot, robot.show(setup())))
            said.append(await fails(robot, robot.show(observation(1, 0, task=""))))
            said.append(await fails(robot, robot.show(observation(1, 0, front=[1]))))
            said.append(await fails(robot, robot.show(observation(1, 0, **{"j3.pos": "x"}))))
            await other.show(observation(1, 0))
            assert len(await other.actions()) == 3
            return said

    said = ask(served, door(), talk)
    wanted = [
        "call Ready first",
        "call SendPolicyInstructions first",
        "takes 2 images; the robot has front",
        "actions_per_chunk is 0",
        "rename_map",
        "no protocol buffer",
        "system', which is not admitted",
        "system', which is not admitted",
        "takes a TimedObservation",
        "`task` must be a sentence",
        "'front' must be an image",
        "'j3.pos' must be an array of numbers",
    ]
    for got, part in zip(said, wanted, strict=True):
        assert part in got
    assert not os.path.exists(TOUCHED)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"timestamp": float("nan")}, "the timestamp is nan"),
        ({"timestamp": float("inf")}, "the timestamp is inf"),
        ({"timestamp": 3}, "the timestamp is 3"),
        ({"timestep": 1 << 63}, "the timestep is"),
        ({"timestep": True}, "the timestep is True"),
        ({"must_go": np.zeros(3)}, "must_go is"),
        ({"must_go": "yes"}, "must_go is 'yes'"),
        ({"observation": {}}, "the observation has no j0.pos"),
        ({"observation": None}, "is a dict"),
    ],
)
def test_an_observation_that_means_nothing_is_refused(
    helpers: None, served: Any, change: dict[str, Any], said: str
) -> None:
    async def talk(address: str) -> str:
        async with Robot(address) as robot:
            await robot.begin(setup())
            bad = observation(1, 0)
            vars(bad).update(change)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await robot.show(bad)
            await robot.show(observation(1, 0))
            assert len(await robot.actions()) == 3
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            return refused.value.details() or ""

    assert said in ask(served, door(), talk)


def test_setups_that_mean_nothing_are_refused(helpers: None, served: Any) -> None:
    odd = setup(rename_map=np.zeros(2))
    named = setup()
    image = named.lerobot_features.pop("observation.images.front")
    named.lerobot_features["observation.images.a\nb\ud800"] = image

    async def talk(address: str) -> list[str]:
        told = []
        async with Robot(address) as robot:
            for config in (odd, setup(rename_map={"a": "b"}), setup(actions_per_chunk=0)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await robot.begin(config)
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                told.append(refused.value.details() or "")
            await robot.begin(named)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await robot.show(observation(1, 0))
            return [*told, refused.value.details() or ""]

    *told, last = ask(served, door(), talk)
    assert ["rename_map" in each or "actions_per_chunk" in each for each in told] == [True] * 3
    assert "a\\nb\\ud800" in last and "\n" not in last


def test_an_observation_that_never_ends_is_given_up(
    helpers: None, served: Any, direct: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_async, "STREAM_S", 0.3)

    async def talk(address: str) -> Any:
        async def never() -> AsyncIterator[bytes]:
            yield b"\x08\x01" + message(2, b"x")
            await asyncio.sleep(3600)

        async with Robot(address) as robot, Robot(address) as canary:
            await robot.begin(setup())
            path = f"/{SERVICE}/SendObservations"
            calls = [robot.channel.stream_unary(path)(never()) for _ in range(5)]
            await canary.begin(setup())
            await canary.show(observation(1, 0))
            actions = await canary.actions()
            told = await asyncio.gather(*calls, return_exceptions=True)
            return actions, [each.details() for each in told]

    actions, told = ask(served, door(), talk)
    assert near([np.stack([a.action.numpy() for a in actions])], [direct([1])[0][:3]])
    assert told == ["a message did not come within 0.3 s"] * 5
