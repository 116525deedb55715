"""Tables in Markdown."""


def test_words_stand_at_the_left_and_numbers_at_the_right(recipe):
    assert recipe.tables.table(("name", "tried", "s"), [("a|b", "1, 2", "0.5")], words=("tried",)) == [
        "| name | tried | s |",
        "| --- | --- | ---: |",
        "| a\\|b | 1, 2 | 0.5 |",
    ]
