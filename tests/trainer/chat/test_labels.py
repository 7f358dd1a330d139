"""Labels: the tokens that carry loss, by the characters that they stand for."""

from finetune_trainer.chat.labels import IGNORED, Encoded, label_tokens, overlaps


def test_white_space_inside_an_answer_carries_loss_and_none_outside() -> None:
    """Places of "a", " " (empty, behind it), "b", and of a mark inserted at the beginning."""
    assert overlaps([(0, 1), (2, 2), (2, 3), (0, 0)], [(1, 3)]) == [False, True, True, False]
    assert overlaps([(0, 1), (1, 3), (3, 4)], [(2, 3)]) == [False, True, False], "a token that begins before an answer"
    assert overlaps([(0, 1)], []) == [False]


def test_labels_are_ids_where_there_is_loss_and_the_first_token_does_not_count() -> None:
    encoded = label_tokens([7, 8, 9], [True, False, True])
    assert encoded == Encoded([7, 8, 9], [7, IGNORED, 9])
    assert encoded.supervised == 1, "nothing predicts the first token"
    assert encoded.truncated(2) == Encoded([7, 8], [7, IGNORED])
