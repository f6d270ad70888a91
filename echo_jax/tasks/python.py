"""Python: compute something from a file with the interpreter, or write a function into `solution.py`.

Levels: more data, longer programs.
Revision 2: the city in a question about records is any, not that of the first record.
"""

from functools import partial

from echo_jax.tasks import python_functions as functions
from echo_jax.tasks import python_questions as questions
from echo_jax.tasks.procedural import ProceduralFamily


class PythonFamily(ProceduralFamily):
    name = "python"
    tools = ("python", "write")
    templates = {  # noqa: RUF012
        "records": questions.records,
        "shortest": questions.shortest,
        "words": questions.words,
        "grid": questions.grid,
        "nested": questions.nested,
        "numbers": questions.numbers,
        "stretches": questions.stretches,
        "walk": questions.walk,
        "encode": functions.encode,
        "runs": functions.runs,
        "duration": functions.duration,
        "merge": functions.merge,
        "machine": functions.machine,
        "ranking": functions.ranking,
    }
    first_templates = {"records": partial(questions.records, revision=1)}  # noqa: RUF012
