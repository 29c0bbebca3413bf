"""`python -m sora.stages manifest|validate|shards`: the door that every project's dvc.yaml names."""

import sys

from sora.dataset.versioning.stages import main

if __name__ == "__main__":
    sys.exit(main())
