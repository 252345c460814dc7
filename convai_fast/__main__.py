"""`python -m convai_fast` is `convai-fast`; `torchrun -m convai_fast` needs it."""

import sys

from convai_fast.cli.main import main

sys.exit(main())
