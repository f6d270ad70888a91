"""The laws of `test_sandbox.py` that a way to make sandboxes can break, for the ways that are not the best of this
host: forks that run as the trainer's user, as an ordinary user's do, and a bwrap for each sandbox."""

import dataclasses

import pytest
from test_sandbox import (  # noqa: F401
    box,
    fresh,
    shared,
    test_a_call_without_a_process_left_is_a_result,
    test_a_command_about_to_start_holds_nothing_of_the_supervisors,
    test_a_file_of_the_host_takes_no_lease_and_a_device_keeps_its_mode,
    test_a_fork_bomb_is_bounded,
    test_a_supervisor_that_does_not_answer_is_an_infrastructure_fault,
    test_abstract_sockets_of_the_host_are_out_of_reach,
    test_agent_does_not_see_host_processes,
    test_agent_sees_only_listed_variables,
    test_call_makes_room_when_processes_run_out_and_says_so,
    test_closing_leaves_no_process_descriptor_or_control_group,
    test_each_supervisor_has_a_session_of_its_own,
    test_every_way_to_limit_ends_a_fork_bomb_and_a_hog,
    test_filter_refuses_what_namespaces_leave_open,
    test_full_disk_is_a_command_error_not_out_of_memory,
    test_host_files_are_absent,
    test_memory_hog_is_killed_and_reported_as_out_of_memory,
    test_no_capability_and_no_new_privileges,
    test_no_descriptor_is_inherited,
    test_no_host_file_can_be_written,
    test_no_sandbox_uses_up_what_the_kernel_grants_a_user,
    test_nothing_outlives_a_time_out,
    test_orphans_do_not_stay_as_zombies,
    test_places_are_where_the_shell_stood_whatever_the_agent_writes,
    test_process_limit_is_enforced,
    test_sandboxes_die_with_their_killed_parent,
    test_the_interpreter_remembers_and_prints_a_last_expression,
    test_the_loopback_of_a_sandbox_works,
    test_the_supervisor_is_out_of_reach,
    test_there_is_no_network,
    test_threads_count_as_processes_when_polled,
    test_two_sandboxes_may_use_one_port,
    test_two_sandboxes_share_no_file_process_semaphore_queue_or_socket,
    test_under_root_each_sandbox_is_a_user_of_its_own,
    watched,
)

from echo_jax.tools import sandbox

pytestmark = pytest.mark.variant


@pytest.fixture(scope="module", params=["as this user", "a bwrap each"], autouse=True)
def way(request):
    accepted = sandbox._accepted
    if request.param == "as this user" and not accepted("auto").forks:
        pytest.skip("this host takes no fork server")
    fields = {"apart": False} if request.param == "as this user" else {"apart": False, "forks": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_accepted", lambda backend: dataclasses.replace(accepted(backend), **fields))
        yield
