"""``python -m fastwire``: what is installed, and what to change. Also where another project's files are among ours."""

import sys

try:
    from fastwire.report import main
except ImportError as error:
    from fastwire.installed import mixed_up

    sys.exit(f"fastwire: {mixed_up() or error}")

main()
