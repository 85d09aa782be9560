"""Success with all and with a quarter of the tokens: python examples/live_evaluation.py [SCENES]"""

import sys
from contextlib import nullcontext

import vla_pruner as vp
from vla_pruner.episodes.control import Control
from vla_pruner.episodes.episode import run_episode
from vla_pruner.episodes.policy_runner import LocalPolicyRunner
from vla_pruner.scenes.suites import PICK_PLACE, open_suite

scenes = int(sys.argv[1]) if len(sys.argv) > 1 else 4
policy = vp.models.load("mini-oft")
suite = open_suite(PICK_PLACE)
scene = suite.open_scene()
control = Control.of(policy, suite.cameras)
for condition in ("none", "vla-pruner@0.25"):
    solved = 0
    with nullcontext() if condition == "none" else vp.prune(policy, condition) as session:
        runner = LocalPolicyRunner(policy, session, control.arguments)
        for seed in suite.held_out(scenes):
            episode = run_episode(
                runner,
                scene,
                seed,
                suite.task_of(seed),
                control=control,
                step_limit=suite.step_limit,
                condition=condition,
            )
            solved += episode.success
    print(f"{condition:16} {solved} of {scenes}")
