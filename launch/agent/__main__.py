"""``python -m launch.agent RUN_DIR``: what srun starts on every node of a job."""

import sys

from launch.agent.main import main

if __name__ == "__main__":
    sys.exit(main())
