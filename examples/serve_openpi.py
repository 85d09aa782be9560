"""openpi's protocol on a pruned policy, and a client: python examples/serve_openpi.py [POLICY]

In the place of openpi's `scripts/serve_policy.py`. Needs the extra `doors`, and a client: that of
clients/python here, or openpi's own `WebsocketClientPolicy` in an environment of its own.
"""

import re
import subprocess
import sys

import numpy as np
from vla_pruner_client import Client

policy = sys.argv[1] if len(sys.argv) > 1 else "mini-pi0"
serve = [sys.executable, "-m", "vla_pruner", "serve", "--policy", policy, "--protocol", "openpi:0"]
server = subprocess.Popen(
    [*serve, "--method", "vla-pruner", "--keep", "0.25"], stdout=subprocess.PIPE, text=True
)
try:
    said = server.stdout.readline()  # "serving ...: openpi on ws://127.0.0.1:PORT (Ctrl-C ends)"
    address = re.search(r"ws://[\w.:]+", said)[0]
    scene, wrist = np.random.default_rng(0).integers(0, 255, (2, 224, 224, 3), dtype=np.uint8)
    with Client(address, timeout_s=60) as robot:  # a connection is an episode
        for _ in range(5):
            answer = robot.infer(
                {
                    "observation/image": scene,
                    "observation/wrist_image": wrist,
                    "observation/state": np.zeros(8),
                    "prompt": "pick up the milk",
                }
            )
            about = answer.about
            print(answer.actions.shape, "all tokens" if about["warm_up"] else about["tokens"])
finally:
    server.terminate()
    server.wait(30)
