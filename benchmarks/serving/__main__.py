"""`python -m benchmarks.serving`."""

from benchmarks.serving.speed import main

if __name__ == "__main__":
    main()
