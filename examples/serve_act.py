"""`/act` on a pruned policy, and a client that asks: python examples/serve_act.py [POLICY]

As OpenVLA and OpenVLA-OFT serve it. Needs the extra `doors`; the client needs no package at all.
"""

import json
import re
import subprocess
import sys
from urllib.request import Request, urlopen

import numpy as np

policy = sys.argv[1] if len(sys.argv) > 1 else "mini-oft"
serve = [sys.executable, "-m", "vla_pruner", "serve", "--policy", policy, "--protocol", "act:0"]
server = subprocess.Popen(
    [*serve, "--method", "vla-pruner", "--keep", "0.25"], stdout=subprocess.PIPE, text=True
)


def array(value):
    """As json-numpy writes it."""
    import base64

    data = base64.b64encode(value.tobytes()).decode()
    return {"__numpy__": data, "dtype": value.dtype.str, "shape": list(value.shape)}


try:
    said = server.stdout.readline()  # "serving ...: act on http://127.0.0.1:PORT/act (Ctrl-C ends)"
    address = re.search(r"http://\S+", said)[0]
    scene, wrist = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)
    for call in range(5):
        message = {
            "full_image": array(scene),
            "wrist_image": array(wrist),
            "state": array(np.zeros(8)),
            "instruction": "pick up the milk",
            "session_id": "arm 1",  # which robot this is; each has its own history
            "reset": call == 0,  # this observation begins an episode
        }
        body = json.dumps(message).encode()
        request = Request(address, body, {"content-type": "application/json"})
        with urlopen(request, timeout=60) as reply:
            actions, keep = json.load(reply), reply.headers["x-vla-pruner-keep"]
        print(f"{len(actions)} actions, with {float(keep):.0%} of the visual tokens")
finally:
    server.terminate()
    server.wait(30)
