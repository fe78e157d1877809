"""The fast set, `scripts/test --fast`: which tests are left out of it, by the marker `slow`.

Whole files: what starts several processes, compiles, builds, or drives another program. Single tests: those that take
longest. Of matrices every n-th case stays.
"""

import re
from collections import Counter

import pytest

SLOW_FILES = {
    "test_evaluation.py",
    "test_fused_triton.py",
    "test_gpu.py",
    "test_gpu_check.py",
    "test_invariants.py",
    "test_reliability.py",
    "test_report.py",
    "test_report_charts.py",
    "test_rollout_ahead.py",
    "test_sandbox.py",
    "test_slurm.py",
    "test_teacher_server.py",
    "test_virtual_device.py",
    "test_vllm.py",
    "test_vllm_server.py",
    "test_wheel.py",
    "test_zero.py",
}
SLOW_TESTS = {
    "test_demo.py::test_a_short_run_learns",
    "test_docs.py::test_commands_run",
    "test_docs.py::test_the_reference_is_the_dataclasses",
    "test_fidelity.py::test_the_students_weights_may_be_bfloat16",
    "test_grading.py::test_a_grader_that_fails_on_one_process_stops_all",
    "test_grading.py::test_every_path_grades_alike",
    "test_heads.py::test_autocast_is_as_exact_as_with_whole_logits",
    "test_heads.py::test_the_teachers_cap_and_scale_count_too",
    "test_methods.py::test_any_split_into_micro_batches_gives_the_same_step",
    "test_methods.py::test_trains_the_same_from_hidden_states_and_whole_logits",
    "test_methods.py::test_two_processes_give_the_same_step",
    "test_samples.py::test_completions_are_a_table_in_trackio",
    "test_samples.py::test_two_processes_take_the_same_steps_and_resume",
    "test_teacher_prompts.py::test_two_processes_take_the_same_steps",
    "test_packing.py::test_two_processes",
    "test_packing.py::test_two_processes_with_a_fixed_order",
    "test_records.py::test_the_recorded_divergence_is_the_method_s",
    "test_reasoning_gym.py::test_problems_depend_on_the_seed_alone",
    "test_rollout.py::test_frequencies_match_the_softmax",
    "test_bad_input.py::test_model_of_the_hub_that_needs_something_else",
    "test_cli.py::test_an_error_that_the_first_process_does_not_have",
    "test_cli.py::test_any_split_of_the_batch_gives_the_same_gradient_and_loss",
    "test_cli.py::test_nothing_needs_an_extra",
    "test_compare.py::test_a_comparison_from_end_to_end",
    "test_compare.py::test_a_failed_task_is_named_and_the_others_are_kept",
    "test_compare.py::test_a_signal_ends_the_teacher_s_process_too",
    "test_compare.py::test_a_signal_stops_the_running_tasks_and_they_continue",
    "test_compare.py::test_every_run_of_a_table_trains",
    "test_compare.py::test_no_model_is_left_beside_another",
    "test_compare.py::test_the_toy_gives_the_papers_table",
    "test_compare.py::test_two_processes_do_a_task_once",
    "test_compare_grid.py::test_a_failed_point_leaves_the_run_out",
    "test_compare_grid.py::test_the_best_on_the_validation_problems_is_trained",
    "test_compare_grid.py::test_two_processes_share_a_grid",
    "test_docs.py::test_the_recipe_of_a_method_is_one_file",
    "test_docs.py::test_the_site_is_built",
    "test_launch.py::test_a_comparison_launches_as_its_configuration_does",
    "test_launch.py::test_a_hub_that_does_not_answer_is_asked_once",
    "test_launch.py::test_a_run_goes_on_however_it_is_launched",
    "test_launch.py::test_all_that_is_missing_is_told_before_a_process_starts",
    "test_launch.py::test_one_process_of_a_file_of_ones_own",
    "test_launch.py::test_several_gpus_are_taken_without_a_word",
    "test_launch.py::test_the_file_says_how_many",
    "test_methods.py::test_grpo_trains_and_resumes_bitwise",
    "test_triton.py::test_kernels_compile",
}
EVERY_NTH = {
    "test_cli.py::test_resume_in_the_middle_of_an_epoch_is_bitwise": 3,
    "test_heads.py::test_a_step_is_that_of_whole_logits": 12,
    "test_heads.py::test_with_the_options_of_a_run": 4,
    "test_methods.py::test_resumes_bitwise": 5,
    "test_packing.py::test_any_budget_gives_the_same_steps": 7,
    "test_packing.py::test_steps_are_those_of_padded_micro_batches": 7,
    "test_triton.py::test_as_launched_on_a_gpu": 7,
}
"""Test -> n, for tests with many cases."""
_LARGE = 7  # n of the largest matrices


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark what isn't in the fast set, and as `long` every second case of the largest matrices."""
    seen: Counter[str] = Counter()
    for item in items:
        test = re.sub(r"\[.*", "", item.nodeid.rpartition("/")[2], flags=re.DOTALL)
        file = test.partition("::")[0]
        nth = seen[test] % EVERY_NTH.get(test, 1)
        if EVERY_NTH.get(test, 1) >= _LARGE and seen[test] % 2:
            item.add_marker(pytest.mark.long)
        seen[test] += 1
        if file in SLOW_FILES or test in SLOW_TESTS or nth:
            item.add_marker(pytest.mark.slow)
