"""`python -m vitprobe`: the command line, as torchrun starts it."""

from vitprobe.cli import main

if __name__ == "__main__":
    main(prog_name="vitprobe")
