"""`python -m drum_hf.cli`."""

from . import main

raise SystemExit(main())
