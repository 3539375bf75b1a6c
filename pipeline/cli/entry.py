"""The console script. It imports little, so that Ctrl-C is answered from the first moment."""

import json
import sys


def main() -> None:
    """Run the command line."""
    try:
        from pipeline.cli.main import main as command

        command()
    except KeyboardInterrupt:  # before a command had begun
        message = "interrupted; nothing had been started"
        if "--json" in sys.argv:
            print(json.dumps({"error": {"message": message, "exit_code": 130}}))
        print(f"error: {message}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
