"""Who wrote a token. The role is stamped when the token is born and never guessed from text afterwards."""

import enum


class Role(enum.IntEnum):
    """The writer of one token, its class; every mask of the objective is derived from it. What the environment writes
    after the prompt comes last, from OBSERVATION on."""

    PAD = 0  # filler of a packed row
    PROMPT = 1  # the task, as the environment states it
    SCAFFOLD = 2  # turn markers, generation prompts, synthesised closes
    ACTION = 3  # sampled by the policy (or written by a demonstrator), stop token included
    OBSERVATION = 4  # the body of a tool's output
    BOILERPLATE = 5  # what a tool's wrapper adds to an output: echoed command, exit status, time-out notice
    TRUNCATION = 6  # the notice that stands for the dropped middle of a long output
    FEEDBACK = 7  # the harness's answer to a call it could not parse
    WARNING = 8  # a rule-based remark of the harness, as that the last turn has come


# |O| of the paper: everything the environment wrote after the prompt, warnings included (arXiv 2605.24517, eq. 3). By
# the name that each class has in configs and metrics; which of them are trained (O') is a weight for each.
ENVIRONMENT_CLASSES = {
    "body": Role.OBSERVATION,
    "boilerplate": Role.BOILERPLATE,
    "truncation": Role.TRUNCATION,
    "feedback": Role.FEEDBACK,
    "warning": Role.WARNING,
}
ENVIRONMENT_ROLES = tuple(ENVIRONMENT_CLASSES.values())
