"""`python -m flows.empty_database FILE`: Prefect's database without user data, for `sora.operations.servers`."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys


def main(file: str) -> None:
    # Prefect reads its settings when it is imported.
    os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{file}"
    from prefect.server.database import provide_database_interface

    asyncio.run(provide_database_interface().create_db())
    with sqlite3.connect(file) as database:  # everything in one file, which is then copied
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode = DELETE")
    database.close()


if __name__ == "__main__":
    main(sys.argv[1])
