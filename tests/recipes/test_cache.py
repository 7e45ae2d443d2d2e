from tfaccel.recipes.cache import StepCache, hash_of


def test_hashes_differ_with_any_part():
    base = hash_of("a", {"x": 1, "y": [1, 2]})

    assert hash_of("a", {"y": [1, 2], "x": 1}) == base
    assert (
        len({base, hash_of("a", {"x": 1, "y": [2, 1]}), hash_of("a", {"x": 2, "y": [1, 2]})}) == 3
    )


def test_a_finished_step_is_found_by_a_new_cache(tmp_path):
    file = tmp_path / "model"
    file.write_bytes(b"weights")
    StepCache(tmp_path / "cache.json").keep("model", "key", file, {"seconds": 2.5})

    found = StepCache(tmp_path / "cache.json")

    assert found.find("model", "key", file) == {"seconds": 2.5}
    assert found.find("model", "other key", file) is None
    assert found.find("other", "key", file) is None


def test_a_changed_or_lost_file_is_not_found(tmp_path):
    file = tmp_path / "model"
    file.write_bytes(b"weights")
    cache = StepCache(tmp_path / "cache.json")
    cache.keep("model", "key", file, {})

    file.write_bytes(b"weight")
    assert cache.find("model", "key", file) is None
    file.unlink()
    assert cache.find("model", "key", file) is None


def test_a_broken_cache_is_an_empty_one(tmp_path):
    file = tmp_path / "model"
    file.write_bytes(b"weights")
    for text in ("{", "[]", '{"model": 3}', '{"model": {}}'):
        (tmp_path / "cache.json").write_text(text)
        assert StepCache(tmp_path / "cache.json").find("model", "key", file) is None
