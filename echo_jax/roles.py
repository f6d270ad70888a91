"""Who wrote a token. The role is stamped when the token is born and never guessed from text afterwards."""

import enum


class Role(enum.IntEnum):
    """The writer of one token; every mask of the objective is derived from it."""

    PAD = 0  # filler of a packed row
    PROMPT = 1  # the task, as the environment states it
    SCAFFOLD = 2  # turn markers, generation prompts, synthesised closes
    ACTION = 3  # sampled by the policy (or written by a demonstrator), stop token included
    OBSERVATION = 4  # the body of a tool's output
    STATUS = 5  # boilerplate around an output: exit status, time-out notice
    TRUNCATION = 6  # the notice that stands for the dropped middle of a long output
    FEEDBACK = 7  # the harness's answer to a call it could not parse


# |O| of the paper: everything the environment wrote after the prompt, warnings included (arXiv 2605.24517, eq. 3).
ENVIRONMENT_ROLES = (Role.OBSERVATION, Role.STATUS, Role.TRUNCATION, Role.FEEDBACK)
# O' of the paper: the part of it whose cross-entropy is trained.
OBSERVATION_ROLES = (Role.OBSERVATION,)
