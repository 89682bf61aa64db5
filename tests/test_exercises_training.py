"""Every checker of lesson 12 accepts the solution, knows the stub, and has a word of its own for each usual mistake."""

from __future__ import annotations

import pytest

from mixtral_lab.exercises import check_balance_loss, check_importance_and_load


def parts(probabilities, chosen):
    n_experts = len(probabilities[0])
    flat = [e for row in chosen for e in row]
    f = [flat.count(e) / len(flat) for e in range(n_experts)]
    p = [sum(row[e] for row in probabilities) / len(probabilities) for e in range(n_experts)]
    return n_experts, f, p


def balance(probabilities, chosen):
    n_experts, f, p = parts(probabilities, chosen)
    return n_experts * sum(a * b for a, b in zip(f, p, strict=True))


def squared(which):
    def answer(*given):
        n_experts, *found = parts(*given)
        return n_experts * sum(x * x for x in found[which])

    return answer


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (balance, True, "can be pushed"),
        (lambda p, c: None, None, "still returns None"),
        (lambda p, c: balance(p, c) / 4, False, "factor is missing: multiply"),
        (lambda p, c: 2 * balance(p, c), False, "per token"),
        (lambda p, c: balance(p, c) / 2, False, "f sums to 2"),
        (lambda p, c: balance(p, [row[:1] for row in c]), False, "first choices alone"),
        (squared(0), False, "f times f"),
        (squared(1), False, "P times P"),
        (lambda p, c: balance(p, c) * 4, False, "take their mean"),
        (lambda p, c: balance(p, c) * 8, False, "counts themselves"),
        (lambda p, c: balance(p, c) * 4 / len(p[0]), False, "written into your code"),
        (lambda p, c: balance(p, c) if len(c) == 4 else 1 / 0, False, "five experts"),
        (lambda p, c: 77, False, "should be"),
        (lambda p, c: "many", False, "one number"),
        (lambda p, c: 1 / 0, False, "ZeroDivisionError"),
    ],
)
def test_balance_loss(answer, solved, says):
    verdict = check_balance_loss(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)


def sums(chosen, weights, n_experts):
    importance, load = [0.0] * n_experts, [0] * n_experts
    for row, shares in zip(chosen, weights, strict=True):
        for e, w in zip(row, shares, strict=True):
            importance[e] += w
            load[e] += 1
    return importance, load


def shares(*given):
    return tuple([x / sum(part) for x in part] for part in sums(*given))


@pytest.mark.parametrize(
    ("answer", "solved", "says"),
    [
        (shares, True, "how busy"),
        (lambda *given: [[x for x in part if x] for part in shares(*given)], False, "nobody chose"),
        (lambda *given: None, None, "still returns None"),
        (lambda *given: shares(*given)[::-1], False, "wrong order"),
        (lambda *given: [shares(*given)[1]] * 2, False, "Both are load"),
        (sums, False, "Those are sums"),
        (lambda *given: (sums(*given)[0], shares(*given)[1]), False, "Importance is a sum"),
        (lambda *given: (shares(*given)[0], sums(*given)[1]), False, "Load is a count"),
        (lambda *given: (shares(*given)[0], [x / 4 for x in sums(*given)[1]]), False, "divided the load by the tokens"),
        (lambda *given: (shares(*given)[0], [0.75, 0, 0, 0.25]), False, "not only the first"),
        (lambda *given: ([0.25] * 4, shares(*given)[1]), False, "Load is right"),
        (lambda *given: (shares(*given)[0], [0.25] * 4), False, "Importance is right"),
        (lambda *given: ([1, 0, 0, 0], [1, 0, 0, 0]), False, "Go through"),
        (lambda *given: ([1.0], [1.0]), False, "four numbers"),
        (lambda *given: 3, False, "two lists"),
        (lambda *given: [][0], False, "IndexError"),
    ],
)
def test_importance_and_load(answer, solved, says):
    verdict = check_importance_and_load(answer)
    assert verdict.solved is solved
    assert says in repr(verdict)
