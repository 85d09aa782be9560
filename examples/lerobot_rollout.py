"""lerobot-rollout with a pruned policy: python examples/lerobot_rollout.py POLICY ROBOT_OPTIONS ...

POLICY is a folder or hub id of a policy of lerobot (pi0, pi0.5, SmolVLA); what follows goes to
`lerobot-rollout`: `--robot.type=so101_follower --robot.port=/dev/ttyACM0 ... --task="pick it up"`.
Needs lerobot[core-scripts] (docs/lerobot.md).
"""

import sys

from lerobot.scripts import lerobot_rollout

import vla_pruner.lerobot  # noqa: F401  registers the policy type `pruned`

policy, *options = sys.argv[1:]
sys.argv = [
    "lerobot-rollout",
    "--policy.type=pruned",
    f"--policy.pretrained_path={policy}",
    "--policy.method=vla-pruner",
    *([] if any(o.startswith("--policy.keep=") for o in options) else ["--policy.keep=0.25"]),
    *options,
]
lerobot_rollout.main()
