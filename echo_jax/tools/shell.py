"""The tools that run code in the sandbox: `bash`, `python`, `sqlite`."""

import shlex
import textwrap

from echo_jax.tools.sandbox import CommandResult, Sandbox
from echo_jax.tools.tool import Tool, strings

DATABASE = "data.db"  # opened by `sqlite` when the agent names no file


class Bash(Tool):
    description = "Runs a command line with bash. Directory, files and exported variables live on between calls."
    parameters = strings("command")

    def run(self, world: Sandbox, arguments) -> CommandResult:
        return world.run(arguments["command"])


class Python(Tool):
    description = "Runs Python code in one interpreter that lives on between calls; prints the last expression's value."
    parameters = strings("code")

    def run(self, world: Sandbox, arguments) -> CommandResult:
        return world.run_python(arguments["code"])


class Sqlite(Tool):
    description = "Runs SQL statements on a SQLite database in the working directory; prints rows as a|b."
    parameters = strings("sql", database=DATABASE)

    def run(self, world: Sandbox, arguments) -> CommandResult:
        database = arguments.get("database", DATABASE)
        return world.run(shlex.join(["python3", "-I", "-c", _CLIENT, database, arguments["sql"]]))


# Like the sqlite3 shell: runs statement by statement, prints rows as they come and NULL as empty, exits 1 on an error.
_CLIENT = textwrap.dedent("""\
    import signal, sqlite3, sys
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        connection = sqlite3.connect(sys.argv[1], isolation_level=None)
        statement = ""
        for part in sys.argv[2].split(";"):
            statement += part + ";"
            if sqlite3.complete_statement(statement):
                for row in connection.execute(statement):
                    print("|".join("" if value is None else str(value) for value in row))
                statement = ""
        if statement.strip("; \\n\\t"):
            connection.execute(statement)
    except (sqlite3.Error, sqlite3.Warning) as error:
        sys.stdout.flush()
        sys.exit(f"Error: {error}")
    """)
