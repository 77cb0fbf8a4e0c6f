"""How patient the tests are: what they run is many times slower under a sanitizer, and slower still beside other work.

Each of their deadlines is a number of seconds times `SLOW`. None is part of a result: it only ends what hangs.
"""

import os

#: FASTWIRE_SLOW, which `tools/sanitized.sh` sets.
SLOW = float(os.environ.get("FASTWIRE_SLOW", "1"))
