"""``python -m launch.agent RUN_DIR``: what srun starts on every node of a job."""

import sys

import gpt_launch.own_names  # noqa: F401
from launch.agent.main import main

if __name__ == "__main__":
    sys.exit(main())
