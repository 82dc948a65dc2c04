"""`python -m wsi_gradcam.cli` runs the command line."""

import sys

from wsi_gradcam.cli.main import main

sys.exit(main())
