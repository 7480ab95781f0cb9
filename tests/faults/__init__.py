"""The faults that a run must survive, by the numbers of the fault list, and where each is tested.

F6 to F10, F12 and F20 concern data and stores; their tests are with those. `test_every_fault_has_its_tests` compares
the list with the files.
"""

COVERED = {
    "F1": [
        "faults/test_kills.py::test_f01_f24_random_kills_end_as_if_nothing_had_happened",
        "integration/test_resume.py::test_kill_at_a_random_step_and_rerun_is_bitwise_the_unbroken_run",
    ],
    "F2": [
        "faults/test_saving.py::test_f02_f03_killed_at_any_change_of_the_disk",
        "faults/test_saving_in_s3.py::test_f02_f03_f23_killed_at_any_request",
        "faults/test_saving_in_s3.py::test_f02_killed_at_any_request_of_an_upload_in_parts",
    ],
    "F3": [
        "faults/test_saving.py::test_f02_f03_killed_at_any_change_of_the_disk",
        "faults/test_saving.py::test_f03_killed_while_the_last_sound_one_is_at_stake",
        "faults/test_saving_in_s3.py::test_f02_f03_f23_killed_at_any_request",
        "checkpoint/test_write.py::test_the_last_sound_one_is_never_removed",
        "checkpoint/test_bucket.py::test_the_last_sound_one_is_never_removed",
    ],
    "F4": [
        "faults/test_stops.py::test_f04_whoever_is_asked_all_save_once_and_the_run_goes_on",
        "faults/test_stops.py::test_f04_workers_outlive_the_signal_and_a_stall_of_the_data",
        "integration/test_resume.py::test_a_signal_saves_once_and_asks_for_a_requeue",
    ],
    "F5": [
        "faults/test_hangs.py::test_f05_a_stopped_rank_ends_the_job_with_stacks_of_all",
        "faults/test_hangs.py::test_f05_a_short_stop_is_waited_for",
        "run/test_watchdog.py::test_a_hang_ends_with_stacks_and_code_1",
    ],
    "F11": [
        "faults/test_saving.py::test_f11_a_full_disk_at_any_write_keeps_the_old_one_and_says_so",
        "checkpoint/test_save.py::test_no_room_is_known_before_writing",
    ],
    "F13": [
        "faults/test_worlds.py::test_f13_other_numbers_of_ranks",
        "faults/test_worlds.py::test_f13_bf16_from_zero_3_to_fsdp2",
        "faults/test_random_runs.py::test_f13_f18_random_attempts_are_the_run_that_nobody_stopped",
        "engine/test_resume.py::test_a_run_continues_on_any_engine_and_world_size",
    ],
    "F14": ["faults/test_worlds.py::test_f14_workers_prefetch_and_micro_batch_may_change"],
    "F15": [
        "faults/test_bitwise.py::test_f15_f18_resumed_is_bitwise_unbroken",
        "faults/test_bitwise.py::test_f15_raw_video_with_augmentation",
    ],
    "F16": [
        "faults/test_numbers.py::test_f16_a_nan_on_one_rank_is_skipped_by_all_and_named",
        "faults/test_numbers.py::test_f16_too_many_in_a_row_end_the_run_and_no_nan_is_saved",
        "run/test_journal.py::test_a_skipped_update_holds_back_the_schedule_but_not_the_step",
    ],
    "F17": [
        "faults/test_numbers.py::test_f17_a_failing_save_is_told_on_all_ranks_and_fatal_at_the_end",
        "faults/test_saving.py::test_f17_a_writer_that_dies_is_heard",
        "checkpoint/test_save.py::test_a_save_slower_than_the_interval_is_left_out_and_not_stacked",
        "checkpoint/test_save.py::test_a_failure_is_heard_at_the_next_step_and_the_next_save_tried",
    ],
    "F18": [
        "faults/test_bitwise.py::test_f15_f18_resumed_is_bitwise_unbroken",
        "faults/test_random_runs.py::test_f13_f18_random_attempts_are_the_run_that_nobody_stopped",
        "engine/test_resume.py::test_a_run_continues_on_any_engine_and_world_size",
        "engine/test_resume.py::test_raw_weights_and_averages_differ",
        "engine/test_resume.py::test_ema_is_bit_equal_to_regathered_weights",
    ],
    "F19": [
        "integration/test_resume.py::test_a_changed_key_is_refused_with_the_difference",
        "integration/test_resume.py::test_other_data_is_refused",
    ],
    "F21": ["faults/test_saving.py::test_f21_meddled_folders_are_named_and_passed_over"],
    "F22": [
        "integration/test_resume.py::test_ranks_whose_launcher_was_killed_stop_and_a_second_attempt_waits_for_nobody",
        "checkpoint/test_write.py::test_an_attempt_that_was_taken_over_commits_nothing_and_removes_nothing",
        "checkpoint/test_bucket.py::test_an_attempt_that_was_taken_over_puts_no_manifest",
        "run/test_lease.py::test_a_second_attempt_beside_a_living_one_is_refused",
        "run/test_claim.py::test_a_second_run_is_refused_while_the_first_is_alive_and_goes_on_after_it",
    ],
    "F23": [
        "faults/test_kills.py::test_f23_a_killed_run_leaves_nothing_that_the_next_one_needs",
        "faults/test_saving.py::test_f02_f03_killed_at_any_change_of_the_disk",
        "faults/test_saving_in_s3.py::test_f02_f03_f23_killed_at_any_request",
    ],
    "F24": ["faults/test_kills.py::test_f01_f24_random_kills_end_as_if_nothing_had_happened"],
}
