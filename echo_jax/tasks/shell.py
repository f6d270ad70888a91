"""Shell: everyday work on files with bash. Some templates ask for an answer, others for a deed.

Levels: more and larger files, nested folders, and more conditions to combine.
Revision 2: the size of a file says nothing about whether it is the answer, unless the question is which one is largest.
"""

from functools import partial

from echo_jax.tasks import shell_deeds as deeds
from echo_jax.tasks import shell_questions as questions
from echo_jax.tasks.procedural import ProceduralFamily


class ShellFamily(ProceduralFamily):
    name = "shell"
    tools = ("bash",)
    templates = {  # noqa: RUF012
        "total": questions.total,
        "largest": questions.largest,
        "frequent": questions.frequent,
        "distinct": questions.distinct,
        "missing": questions.missing,
        "holder": questions.holder,
        "rename": deeds.rename,
        "remove": deeds.remove,
        "replace": deeds.replace,
        "permissions": deeds.permissions,
        "sort": deeds.sort,
        "columns": deeds.columns,
        "archive": deeds.archive,
        "links": deeds.links,
    }
    first_templates = {  # noqa: RUF012
        "largest": partial(questions.largest, revision=1),
        "holder": partial(questions.holder, revision=1),
    }
