"""Every promise of docs/security.md is held by tests, which are named here."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "security.md"

FUZZ = "test_hostile_files.py::test_a_few_hundred_mutations"
LOADING, IMAGES, ENDPOINT = "encoders/test_loading.py", "utils/test_images.py", "lvlm/test_endpoint.py"
SAVING, FILES, HOSTILE = "retriever/test_saving.py", "utils/test_files.py", "test_hostile_files.py"

#: How a promise begins -> the tests that hold it.
PROMISES = {
    "No file runs code": [
        f"{LOADING}::test_pickled_weights_are_never_read",
        f"{SAVING}::test_a_pickle_is_never_run",
        f"{HOSTILE}::test_a_pickle_under_another_name_is_not_run",
        f"{HOSTILE}::test_an_lvlms_adapter_that_is_a_pickle",
        FUZZ,
    ],
    "Only known files with known settings": [
        f"{LOADING}::test_settings_that_lead_elsewhere",
        f"{LOADING}::test_adapters_of_other_settings",
        f"{SAVING}::test_a_configuration_that_was_never_written",
    ],
    "Nothing outside the folder is opened": [
        f"{LOADING}::test_nothing_outside_is_opened",
        f"{LOADING}::test_shards_are_files_of_the_folder",
        f"{LOADING}::test_links_and_pipes",
        f"{SAVING}::test_links_and_pipes_are_not_read",
        f"{HOSTILE}::test_shards_lie_in_their_folder",
        FUZZ,
    ],
    "The base model of an adapter": [f"{LOADING}::test_the_base_of_an_adapter_is_checked_as_any_model"],
    "An adapter is LoRA only": [
        f"{LOADING}::test_adapters_of_other_settings",
        f"{HOSTILE}::test_an_adapter_that_is_none_changes_nothing",
    ],
    "A tokenizer can't take": [f"{LOADING}::test_a_tokenizer_that_takes_without_end"],
    "Tensors are checked": [
        "index/test_index.py::test_tensors_that_do_not_fit_are_refused_before_faiss_reads_them",
        f"{HOSTILE}::test_an_encoder_whose_parts_do_not_fit",
    ],
    "A score store holds no SQL": [
        f"{HOSTILE}::test_a_store_with_sql_of_its_own_is_refused",
        f"{HOSTILE}::test_an_entry_that_was_altered_is_named",
    ],
    "Imported scores": [
        "scores/test_transfer.py::test_an_altered_row_is_refused",
        "scores/test_transfer.py::test_an_altered_key_is_named",
    ],
    "A parquet file": [
        f"{HOSTILE}::test_parquet_that_swells_is_refused",
        f"{HOSTILE}::test_yaml_that_is_no_configuration",
        "data/test_loading.py::test_archives_that_are_refused",
        f"{FILES}::test_json_within_bounds",
    ],
    "An image has at most": [
        f"{IMAGES}::test_too_many_pixels_are_refused_before_they_are_decoded",
        f"{IMAGES}::test_too_many_bytes_are_refused",
        f"{IMAGES}::test_no_format_starts_another_program",
    ],
    "Addresses of images are off": [
        f"{IMAGES}::test_addresses_are_off_and_private_hosts_are_refused",
        f"{IMAGES}::test_a_redirect_to_a_private_host_is_refused",
        f"{IMAGES}::test_a_server_that_is_slow_silent_or_endless",
    ],
    "The pixels of a saved table": ["data/test_loading.py::test_pixels_are_compared_with_their_hash"],
    "A data set of the Hub": [
        "data/test_loading.py::test_a_hub_data_set_reads_no_file_of_this_machine",
        "data/test_loading.py::test_what_load_dataset_gave_reads_no_file_of_this_machine",
    ],
    "Image paths of a table": [
        "data/test_loading.py::test_image_paths_may_not_leave_the_folder",
        f"{HOSTILE}::test_a_link_out_of_the_folder_is_refused",
    ],
    "An answer has a limit of bytes": [
        f"{ENDPOINT}::test_an_answer_has_a_bound_in_bytes",
        f"{ENDPOINT}::test_a_request_has_one_limit_of_time",
    ],
    "Odd answers end": [
        f"{ENDPOINT}::test_odd_answers_end_in_a_named_error",
        f"{ENDPOINT}::test_a_lie_about_usage_never_lowers_what_is_spent",
    ],
    "An answer that can't be stored": [
        "scores/test_cached.py::test_an_answer_that_can_not_be_stored_costs_no_other",
        f"{ENDPOINT}::test_answers_are_what_a_store_can_hold",
    ],
    "Redirects are not followed": [f"{ENDPOINT}::test_cookies_are_not_kept_and_redirects_not_followed"],
    "API keys, passwords": [
        f"{ENDPOINT}::test_the_key_is_shown_nowhere",
        f"{ENDPOINT}::test_a_key_in_the_address_is_sent_and_shown_nowhere",
        f"{ENDPOINT}::test_secrets_in_extra_fields_are_sent_but_not_part_of_the_identity",
        "utils/test_redaction.py::test_commands",
    ],
    "Published files hold no path": [
        "retriever/test_publishing.py::test_a_retriever_tells_no_folder",
        "retriever/test_publishing.py::test_scores_tell_no_folder",
        "cli/test_cli.py::test_demo_writes_what_it_promises",
    ],
    "Text from files and endpoints": [
        "cli/test_terminal.py::test_an_error_is_one_line_that_controls_nothing",
        "cli/test_terminal.py::test_what_is_printed_controls_nothing",
        "cli/test_terminal.py::test_logs_control_nothing",
        "cli/test_scores.py::test_a_strangers_names_do_not_reach_the_terminal_raw",
    ],
    "Text in model cards": [
        f"{SAVING}::test_untrusted_entries_are_shown_as_text",
        "experiments/test_report.py::test_users_text_is_escaped_everywhere",
    ],
    "The app shows names": [
        "serving/test_app.py::test_names_of_a_retriever_are_shown_as_text",
        "serving/test_app.py::test_cards_show_what_was_found_and_let_no_markup_through",
    ],
    "A save replaces the older one": [
        f"{FILES}::test_a_folder_killed_at_every_step_is_the_old_or_the_new",
        f"{FILES}::test_a_file_killed_at_every_step_is_the_old_or_the_new",
        f"{SAVING}::test_savers_killed_and_in_pairs",
        "tuning/test_tuning.py::test_a_killed_save_leaves_the_old_or_the_new",
    ],
    "Two savers of one folder": [
        f"{FILES}::test_savers_take_turns_and_readers_see_one_of_them",
        f"{SAVING}::test_savers_killed_and_in_pairs",
    ],
    "A full disk": ["scores/test_faults.py::test_a_full_disk_leaves_what_was_saved_before"],
    "Ctrl-C ends": [
        "cli/test_interrupt.py::test_a_silent_endpoint_keeps_no_command",
        "cli/test_interrupt.py::test_nothing_holds_it_up",
    ],
}


def promises() -> list[str]:
    section = PAGE.read_text(encoding="utf-8").split("## What you can rely on")[1].split("\n## ")[0]
    return re.findall(r"^- (.+)$", section, re.MULTILINE)


@functools.cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_promise_has_its_tests_and_every_entry_its_promise():
    beginnings = list(PROMISES)
    held = [[each for each in beginnings if promise.startswith(each)] for promise in promises()]
    assert len(held) > 20 and all(len(each) == 1 for each in held)
    assert [each[0] for each in held] == beginnings


@pytest.mark.parametrize("beginning", PROMISES)
def test_the_tests_of_a_promise_are_there(beginning):
    for test in PROMISES[beginning]:
        file, _, name = test.partition("::")
        assert name in functions(file), f"{test} holds {beginning!r}, and is gone"
