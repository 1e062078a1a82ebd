"""Before any test loads torch: one thread, here and in the scripts that tests start.

The networks are tiny, and two threads that wait by spinning made the suite ten times slower beside
any other busy process.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
