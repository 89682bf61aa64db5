"""Small maths problems with worked steps whose every number is computed, never guessed.

Each generator returns a question (one line), a list of steps and an answer. A line of the form
``left = right`` that holds only numbers and ``+ - * / ( ) ^`` is always true, as the tests check with Python.
"""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from mixtral_lab.train.stories import BOYS, FRUITS, GIRLS, TOYS, words

ONES = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = words("_ _ twenty thirty forty fifty sixty seventy eighty ninety")


class Problem(NamedTuple):
    """A question, the steps that lead to its answer, and the answer."""

    question: str
    steps: list[str]
    answer: str


def in_words(number: int) -> str:
    """Return a number from 0 to 9999 in English words: 47 is ``forty-seven``."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = number % size
    return f"{in_words(number // size)} {name}" + (f" {'and ' if rest < 100 else ''}{in_words(rest)}" if rest else "")


def signed(number: int) -> str:
    """Return ``+ 3`` or ``- 3``."""
    return f"+ {number}" if number >= 0 else f"- {-number}"


def bracket(number: int) -> str:
    """Return a number, in brackets if it is negative."""
    return str(number) if number >= 0 else f"({number})"


def polynomial(coefficients: list[int], x: str = "x") -> str:
    """Write a polynomial, its coefficients listed from the constant upwards: [1, -2, 3] is 3x^2 - 2x + 1."""
    text = ""
    for power in range(len(coefficients) - 1, -1, -1):
        factor = coefficients[power]
        if factor == 0:
            continue
        letter = "" if power == 0 else x if power == 1 else f"{x}^{power}"
        size = str(abs(factor)) if abs(factor) != 1 or power == 0 else ""
        sign = (" + " if factor > 0 else " - ") if text else ("" if factor > 0 else "-")
        text += f"{sign}{size}{letter}"
    return text or "0"


def addition(rng: random.Random) -> Problem:
    """Add two numbers place by place."""
    digits = rng.choice([2, 2, 3])
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    steps, parts = [], []
    for place in range(digits - 1, -1, -1):
        unit = 10**place
        x, y = a // unit % 10 * unit, b // unit % 10 * unit
        steps.append(f"{x} + {y} = {x + y}")
        parts.append(x + y)
    steps.append(" + ".join(map(str, parts)) + f" = {a + b}")
    question = rng.choice([f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} + {b} = ?"])
    return Problem(question, steps, str(a + b))


def subtraction(rng: random.Random) -> Problem:
    """Subtract by counting up from the smaller number."""
    b = rng.randrange(11, 400)
    a = b + rng.randrange(3, 400)
    question = rng.choice([f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"{a} - {b} = ?"])
    nearest = min(-(-b // 10) * 10, a)
    if nearest == b:
        return Problem(question, [f"{a} - {b} = {a - b}"], str(a - b))
    steps = [f"From {b} to {nearest}: {nearest - b}", f"From {nearest} to {a}: {a - nearest}"]
    return Problem(question, [*steps, f"{nearest - b} + {a - nearest} = {a - b}"], str(a - b))


def carrying(rng: random.Random) -> Problem:
    """Add two numbers digit by digit from the right, with carries."""
    a, b = rng.randrange(100, 10000), rng.randrange(100, 10000)
    steps, carry = [], 0
    left, right = str(a)[::-1], str(b)[::-1]
    for place in range(max(len(left), len(right))):
        x = int(left[place]) if place < len(left) else 0
        y = int(right[place]) if place < len(right) else 0
        total = x + y + carry
        steps.append(
            f"{x} + {y}{' + 1' if carry else ''} = {total}, write {total % 10}{', carry 1' if total > 9 else ''}"
        )
        carry = total // 10
    if carry:
        steps.append("write 1")
    return Problem(f"Add {a} + {b} digit by digit.", steps, str(a + b))


def multiplication(rng: random.Random) -> Problem:
    """Multiply by taking one factor apart."""
    a, b = rng.randrange(11, 100), rng.choice([rng.randrange(2, 10), rng.randrange(11, 60)])
    question = rng.choice([f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"{a} times {b} = ?"])
    split, other = (a, b) if b < 10 else (b, a)
    tens, ones = split // 10 * 10, split % 10
    if not ones:
        return Problem(
            question,
            [f"{split // 10} * {other} = {split // 10 * other}", f"{split // 10 * other} * 10 = {a * b}"],
            str(a * b),
        )
    steps = [f"{tens} * {other} = {tens * other}", f"{ones} * {other} = {ones * other}"]
    return Problem(question, [*steps, f"{tens * other} + {ones * other} = {a * b}"], str(a * b))


def times_table(rng: random.Random) -> Problem:
    """Take one row of the times tables."""
    a, start = rng.randrange(2, 13), rng.randrange(1, 8)
    rows = [f"{i} * {a} = {i * a}" for i in range(start, start + rng.randrange(3, 6))]
    last = start + len(rows)
    return Problem(f"Continue the table of {a} up to {last} * {a}.", rows, f"{last} * {a} = {last * a}")


def division(rng: random.Random) -> Problem:
    """Divide with remainder and check."""
    b, quotient = rng.randrange(2, 13), rng.randrange(3, 80)
    rest = rng.choice([0, rng.randrange(b)])
    a = b * quotient + rest
    steps = [f"{b} * {quotient} = {b * quotient}"]
    if rest:
        steps.append(f"{a} - {b * quotient} = {rest}")
    question = rng.choice([f"What is {a} divided by {b}?", f"Divide {a} by {b}.", f"{a} / {b} = ?"])
    return Problem(question, steps, f"{quotient}" + (f" remainder {rest}" if rest else ""))


def order_of_operations(rng: random.Random) -> Problem:
    """Evaluate an expression one operation at a time."""
    a, b, c, d = (rng.randrange(2, 13) for _ in range(4))
    chains = [
        [f"{a} + {b} * {c}", f"{a} + {b * c}", f"{a + b * c}"],
        [f"({a} + {b}) * {c}", f"{a + b} * {c}", f"{(a + b) * c}"],
        [f"{a} * {b} - {c} * {d}", f"{a * b} - {c * d}", f"{a * b - c * d}"],
        [f"{a} * ({b} + {c}) - {d}", f"{a} * {b + c} - {d}", f"{a * (b + c)} - {d}", f"{a * (b + c) - d}"],
        [f"{a}^2 + {b} * {c}", f"{a * a} + {b * c}", f"{a * a + b * c}"],
        [f"({a} + {b}) * ({c} + {d})", f"{a + b} * {c + d}", f"{(a + b) * (c + d)}"],
        [f"{a * b} / {a} + {c}", f"{b} + {c}", f"{b + c}"],
    ]
    chain = rng.choice(chains)
    steps = [f"{before} = {after}" for before, after in pairwise(chain)]
    return Problem(rng.choice([f"Evaluate {chain[0]}.", f"Compute {chain[0]}.", f"{chain[0]} = ?"]), steps, chain[-1])


def chain_of_sums(rng: random.Random) -> Problem:
    """Work through a chain of additions and subtractions from the left."""
    numbers = [rng.randrange(1, 60) for _ in range(rng.randrange(3, 6))]
    signs = [rng.choice("+-") for _ in numbers[1:]]
    text, total, steps = str(numbers[0]), numbers[0], []
    for sign, number in zip(signs, numbers[1:], strict=True):
        after = total + number if sign == "+" else total - number
        steps.append(f"{total} {sign} {number} = {after}")
        text, total = f"{text} {sign} {number}", after
    return Problem(f"Compute {text}.", steps, str(total))


def linear_equation(rng: random.Random) -> Problem:
    """Solve a * x + b = c and check the solution."""
    x, value = rng.choice("xyzabnmtw"), rng.randrange(-10, 16)
    a, b = rng.choice([2, 3, 4, 5, 6, 7, 8, 9, -2, -3, -4]), rng.choice([*range(-20, 0), *range(1, 21)])
    c = a * value + b
    verb = "Subtract" if b > 0 else "Add"
    steps = [
        f"{verb} {abs(b)} on both sides: {a}{x} = {c} {signed(-b)} = {c - b}",
        f"Divide by {a}: {x} = {c - b} / {bracket(a)} = {value}",
        f"Check: {a} * {bracket(value)} {signed(b)} = {c}",
    ]
    return Problem(f"Solve for {x}: {a}{x} {signed(b)} = {c}", steps, f"{x} = {value}")


def both_sides(rng: random.Random) -> Problem:
    """Solve a * x + b = c * x + d."""
    x, value = rng.choice("xyzn"), rng.randrange(-8, 13)
    c = rng.randrange(2, 7)
    a = c + rng.randrange(2, 6)
    b = rng.randrange(1, 20)
    d = (a - c) * value + b
    steps = [
        f"Subtract {c}{x}: {a - c}{x} + {b} = {d}",
        f"Subtract {b}: {a - c}{x} = {d - b}",
        f"Divide by {a - c}: {x} = {value}",
    ]
    return Problem(f"Solve for {x}: {a}{x} + {b} = {c}{x} {signed(d)}", steps, f"{x} = {value}")


def sum_and_difference(rng: random.Random) -> Problem:
    """Solve x + y = s, x - y = d."""
    y = rng.randrange(1, 30)
    x = y + rng.randrange(1, 30)
    steps = [
        f"Add both equations: 2x = {x + y} + {x - y} = {2 * x}",
        f"x = {2 * x} / 2 = {x}",
        f"y = {x + y} - {x} = {y}",
    ]
    return Problem(f"Two numbers have the sum {x + y} and the difference {x - y}. Find them.", steps, f"{x} and {y}")


def quadratic(rng: random.Random) -> Problem:
    """Factor a quadratic with whole roots."""
    p, q = rng.randrange(-9, 10), rng.randrange(-9, 10)
    equation = polynomial([p * q, -(p + q), 1])
    factors = "".join(f"(x {signed(-root)})" if root else "x" for root in (p, q))
    answer = f"x = {p}" if p == q else f"x = {min(p, q)} or x = {max(p, q)}"
    steps = [
        f"Find two numbers with product {p * q} and sum {-(p + q)}: {-p} and {-q}",
        f"{bracket(-p)} * {bracket(-q)} = {p * q}",
        f"{equation} = {factors}",
    ]
    return Problem(f"Solve {equation} = 0.", steps, answer)


def expand_brackets(rng: random.Random) -> Problem:
    """Multiply out two brackets."""
    a, b = (
        rng.choice([-5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7]),
        rng.choice([-6, -5, -3, -2, -1, 1, 2, 4, 5, 8]),
    )
    middle = f"{polynomial([0, b])} {signed(a)[0]} {polynomial([0, abs(a)])} = {polynomial([0, a + b])}"
    steps = ["x * x = x^2", middle, f"{bracket(a)} * {bracket(b)} = {a * b}"]
    return Problem(f"Expand (x {signed(a)})(x {signed(b)}).", steps, polynomial([a * b, a + b, 1]))


def fractions(rng: random.Random) -> Problem:
    """Add or subtract two fractions over a common denominator."""
    b, d = rng.randrange(2, 13), rng.randrange(2, 13)
    a, c = rng.randrange(1, b + 1), rng.randrange(1, d + 1)
    common = math.lcm(b, d)
    x, y = a * common // b, c * common // d
    sign = "+" if rng.random() < 0.6 or x < y else "-"
    total = x + y if sign == "+" else x - y
    steps = [
        f"The common denominator is {common}.",
        f"{a}/{b} = {x}/{common}",
        f"{c}/{d} = {y}/{common}",
        f"{x}/{common} {sign} {y}/{common} = {total}/{common}",
    ]
    answer = str(Fraction(total, common))
    if answer != f"{total}/{common}":
        steps.append(f"{total}/{common} = {answer}")
    return Problem(f"Compute {a}/{b} {sign} {c}/{d}.", steps, answer)


def simplify_fraction(rng: random.Random) -> Problem:
    """Cancel the greatest common divisor."""
    low, factor = Fraction(rng.randrange(1, 20), rng.randrange(2, 20)), rng.randrange(2, 13)
    n, d = low.numerator * factor, low.denominator * factor
    steps = [
        f"Both numbers can be divided by {factor}.",
        f"{n} / {factor} = {low.numerator}",
        f"{d} / {factor} = {low.denominator}",
    ]
    return Problem(f"Simplify {n}/{d}.", steps, str(low))


def compare_fractions(rng: random.Random) -> Problem:
    """Say which of two fractions is larger."""
    b, d = rng.sample(range(2, 13), 2)
    a, c = rng.randrange(1, b), rng.randrange(1, d)
    common = math.lcm(b, d)
    x, y = a * common // b, c * common // d
    answer = f"{a}/{b}" if x > y else f"{c}/{d}" if y > x else "They are equal."
    return Problem(
        f"Which is larger, {a}/{b} or {c}/{d}?",
        [f"{a}/{b} = {x}/{common}", f"{c}/{d} = {y}/{common}"],
        answer,
    )


def percentage(rng: random.Random) -> Problem:
    """Take a percentage by way of one percent."""
    percent, hundreds = rng.choice([5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80]), rng.randrange(1, 50)
    number = hundreds * 20
    one = Fraction(number, 100)
    one_text = f"{number / 100:g}"
    value = f"{float(one * percent):g}"
    steps = [f"1% of {number}: {number} / 100 = {one_text}", f"{percent} * {one_text} = {value}"]
    return Problem(f"What is {percent}% of {number}?", steps, value)


def sequence(rng: random.Random) -> Problem:
    """Continue a sequence."""
    kind, start = rng.choice(["step", "step", "factor", "square", "fibonacci"]), rng.randrange(1, 40)
    if kind == "step":
        step = rng.choice([2, 3, 4, 5, 6, 7, 8, 9, 10, 11, -1, -2, -3])
        terms, rule = (
            [start + step * i for i in range(6)],
            f"Each term is {abs(step)} {'more' if step > 0 else 'less'} than the one before.",
        )
    elif kind == "factor":
        start, factor = rng.randrange(1, 9), rng.choice([2, 3, 4])
        terms, rule = [start * factor**i for i in range(6)], f"Each term is {factor} times the one before."
    elif kind == "square":
        start = rng.randrange(1, 15)
        terms, rule = (
            [(start + i) ** 2 for i in range(6)],
            "These are the squares of " + ", ".join(str(start + i) for i in range(6)) + ".",
        )
    else:
        terms = [rng.randrange(1, 9), rng.randrange(1, 9)]
        while len(terms) < 6:
            terms.append(terms[-1] + terms[-2])
        rule = "Each term is the sum of the two before."
    last = {"step": "", "factor": "", "square": ""}.get(kind, f"{terms[3]} + {terms[4]} = {terms[5]}")
    return Problem(
        f"What comes next: {', '.join(map(str, terms[:5]))}?",
        [rule, *([last] if last else [])],
        str(terms[5]),
    )


def greatest_divisor(rng: random.Random) -> Problem:
    """Find a greatest common divisor with Euclid's algorithm."""
    common = rng.randrange(2, 20)
    x, y = sorted((common * rng.randrange(2, 16), common * rng.randrange(2, 16)), reverse=True)
    question, steps = f"Find the greatest common divisor of {x} and {y}.", []
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return Problem(question, steps, str(x))


def prime_factors(rng: random.Random) -> Problem:
    """Take a number apart into primes."""
    number = rng.randrange(12, 600)
    rest, factors, steps = number, [], []
    divisor = 2
    while rest > 1:
        if rest % divisor == 0:
            if rest != divisor:
                steps.append(f"{rest} = {divisor} * {rest // divisor}")
            factors.append(divisor)
            rest //= divisor
        else:
            divisor += 1
    answer = f"{number} is prime." if len(factors) == 1 else " * ".join(map(str, factors))
    return Problem(f"Write {number} as a product of primes.", steps or ["No smaller prime divides it."], answer)


def shape(rng: random.Random) -> Problem:
    """Find an area, a perimeter, a hypotenuse or a volume."""
    a, b, c = (rng.randrange(2, 25) for _ in range(3))
    unit = rng.choice(["cm", "m", "km", "mm"])
    p, q, r = rng.choice([(3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25)])
    k = rng.randrange(1, 6)
    return rng.choice(
        [
            Problem(
                f"A rectangle is {a} {unit} long and {b} {unit} wide. What is its area?",
                [f"{a} * {b} = {a * b}"],
                f"{a * b} square {unit}",
            ),
            Problem(
                f"A rectangle is {a} {unit} long and {b} {unit} wide. What is its perimeter?",
                [f"{a} + {b} = {a + b}", f"2 * {a + b} = {2 * (a + b)}"],
                f"{2 * (a + b)} {unit}",
            ),
            Problem(
                f"A triangle has base {2 * a} {unit} and height {b} {unit}. What is its area?",
                [f"{2 * a} * {b} = {2 * a * b}", f"{2 * a * b} / 2 = {a * b}"],
                f"{a * b} square {unit}",
            ),
            Problem(
                f"A right triangle has legs {p * k} {unit} and {q * k} {unit}. How long is the hypotenuse?",
                [
                    f"{p * k}^2 + {q * k}^2 = {(p * k) ** 2} + {(q * k) ** 2}",
                    f"{(p * k) ** 2} + {(q * k) ** 2} = {(r * k) ** 2}",
                    f"{(r * k) ** 2} = {r * k}^2",
                ],
                f"{r * k} {unit}",
            ),
            Problem(
                f"A box is {a} {unit} by {b} {unit} by {c} {unit}. What is its volume?",
                [f"{a} * {b} = {a * b}", f"{a * b} * {c} = {a * b * c}"],
                f"{a * b * c} cubic {unit}",
            ),
            Problem(
                f"A square has the area {a * a} square {unit}. How long is one side?",
                [f"{a} * {a} = {a * a}"],
                f"{a} {unit}",
            ),
        ]
    )


def average(rng: random.Random) -> Problem:
    """Find the mean of a few numbers."""
    count = rng.randrange(3, 6)
    numbers = [rng.randrange(1, 40) for _ in range(count - 1)]
    last = -sum(numbers) % count
    numbers.append(last + count * rng.randrange(1, 6))
    total = sum(numbers)
    steps = [" + ".join(map(str, numbers)) + f" = {total}", f"{total} / {count} = {total // count}"]
    return Problem(f"Find the average of {', '.join(map(str, numbers))}.", steps, str(total // count))


def clock(rng: random.Random) -> Problem:
    """Add minutes to a time of day."""
    hour, minute, more = rng.randrange(0, 23), rng.randrange(0, 60, 5), rng.randrange(5, 180, 5)
    total = minute + more
    carry = total // 60
    steps = [f"{minute} + {more} = {total}"]
    if carry:
        steps += [f"{total} - {60 * carry} = {total % 60}", f"{hour} + {carry} = {hour + carry}"]
    if hour + carry >= 24:
        steps.append(f"{hour + carry} - 24 = {hour + carry - 24}")
    return Problem(
        f"It is {hour}:{minute:02d}. What time is it in {more} minutes?",
        steps,
        f"{(hour + carry) % 24}:{total % 60:02d}",
    )


def order_numbers(rng: random.Random) -> Problem:
    """Sort numbers, taking the smallest one out each time."""
    numbers = rng.sample(range(1, 100), rng.randrange(4, 6))
    rest, steps = list(numbers), []
    while len(rest) > 1:
        smallest = min(rest)
        rest.remove(smallest)
        steps.append(f"Take {smallest}, left: {', '.join(map(str, rest))}")
    return Problem(
        f"Sort from small to large: {', '.join(map(str, numbers))}.",
        steps,
        ", ".join(map(str, sorted(numbers))),
    )


def substitution(rng: random.Random) -> Problem:
    """Put a value into a polynomial."""
    x, coefficients = (
        rng.randrange(-4, 7),
        [
            rng.randrange(-9, 10),
            rng.choice([-3, -2, 1, 2, 3, 4]),
            rng.choice([1, 1, 2, 3]),
        ],
    )
    c, b, a = coefficients
    value = a * x * x + b * x + c
    steps = [
        f"f({x}) = {a} * {bracket(x)}^2 {signed(b)} * {bracket(x)} {signed(c)}",
        f"{a} * {x * x} {signed(b * x)} {signed(c)} = {value}",
    ]
    return Problem(f"Let f(x) = {polynomial(coefficients)}. Find f({x}).", steps, str(value))


def derivative(rng: random.Random) -> Problem:
    """Differentiate a polynomial term by term."""
    coefficients = [rng.randrange(-9, 10) for _ in range(rng.randrange(3, 5))]
    coefficients[-1] = coefficients[-1] or 2
    steps = [
        f"The derivative of {polynomial([0] * power + [factor])} is {polynomial([0] * (power - 1) + [power * factor])}."
        for power, factor in enumerate(coefficients)
        if power and factor
    ][::-1]
    derived = [power * factor for power, factor in enumerate(coefficients)][1:]
    return Problem(f"Differentiate f(x) = {polynomial(coefficients)}.", steps, f"f'(x) = {polynomial(derived)}")


def spelled(rng: random.Random) -> Problem:
    """Write a number in words or take its digits apart."""
    number = rng.randrange(11, 10000)
    places = [
        int(digit) * 10**power for power, digit in zip(range(len(str(number)) - 1, -1, -1), str(number), strict=True)
    ]
    parts = " + ".join(str(part) for part in places if part)
    return rng.choice(
        [
            Problem(f"Write {number} in words.", [f"{parts} = {number}"], in_words(number)),
            Problem(f"Write {in_words(number)} in digits.", [f"{parts} = {number}"], str(number)),
            Problem(
                f"Add the digits of {number}.",
                [" + ".join(str(number)) + f" = {sum(map(int, str(number)))}"],
                str(sum(map(int, str(number)))),
            ),
        ]
    )


def rounding(rng: random.Random) -> Problem:
    """Round to tens or hundreds."""
    number, unit = rng.randrange(11, 5000), rng.choice([10, 100])
    low = number // unit * unit
    half = low + unit // 2
    up = number >= half
    steps = [
        f"{number} lies between {low} and {low + unit}. The middle is {half}.",
        f"{number} is {'at or above' if up else 'below'} the middle, so round {'up' if up else 'down'}.",
    ]
    return Problem(f"Round {number} to the nearest {unit}.", steps, str(low + unit if up else low))


def shop(rng: random.Random) -> Problem:
    """Pay for things and get change."""
    name, (first, second) = rng.choice(GIRLS + BOYS), rng.sample(FRUITS, 2)
    n, m, p, q = (rng.randrange(2, 8) for _ in range(4))
    cost = n * p + m * q
    paid = next(bill for bill in (20, 50, 100, 200) if bill >= cost)
    steps = [
        f"{n} * {p} = {n * p}",
        f"{m} * {q} = {m * q}",
        f"{n * p} + {m * q} = {cost}",
        f"{paid} - {cost} = {paid - cost}",
    ]
    question = (
        f"{name} buys {n} {first} for {p} coins each and {m} {second} for {q} coins each, and pays with"
        f" {paid} coins. How many coins does {name} get back?"
    )
    return Problem(question, steps, f"{paid - cost} coins")


def word_problem(rng: random.Random) -> Problem:
    """Follow how many things somebody has through two changes."""
    name, other = rng.sample(GIRLS + BOYS, 2)
    things = rng.choice(
        [
            *FRUITS,
            *(f"{toy}s" for toy in TOYS if " " not in toy and toy[-1] not in "shx"),
            "stickers",
            "stones",
            "shells",
        ]
    )
    have, more, boxes = rng.randrange(5, 60), rng.randrange(2, 40), rng.randrange(2, 9)
    less = rng.randrange(1, have + more)
    per = rng.randrange(2, 12)
    legs = rng.randrange(2, 9)
    animal = rng.choice(words("rabbit fox bear goat pony badger lamb donkey"))
    plural = "foxes" if animal == "fox" else "ponies" if animal == "pony" else f"{animal}s"
    return rng.choice(
        [
            Problem(
                f"{name} has {have} {things}. {other} gives {name} {more} more. Then {name} loses {less}. How"
                f" many {things} does {name} have now?",
                [f"{have} + {more} = {have + more}", f"{have + more} - {less} = {have + more - less}"],
                f"{have + more - less} {things}",
            ),
            Problem(
                f"There are {boxes} boxes with {per} {things} in each box. {name} takes"
                f" {min(less, boxes * per)} {things} out. How many are left?",
                [
                    f"{boxes} * {per} = {boxes * per}",
                    f"{boxes * per} - {min(less, boxes * per)} = {boxes * per - min(less, boxes * per)}",
                ],
                f"{boxes * per - min(less, boxes * per)} {things}",
            ),
            Problem(
                f"{name} shares {boxes * per} {things} among {boxes} friends. How many does each friend get?",
                [f"{boxes * per} / {boxes} = {per}"],
                f"{per} {things}",
            ),
            Problem(
                f"{name} is {have} years old. {other} is {more} years older. How old is {other}?",
                [f"{have} + {more} = {have + more}"],
                f"{have + more} years old",
            ),
            Problem(
                (
                    f"{name} has {have} {things}. {other} has {more} fewer. How many do they have together?"
                    if more < have
                    else (f"{name} has {have} {things}. {other} has {more} more. How many do they have together?")
                ),
                [
                    (f"{have} {'-' if more < have else '+'} {more} = {have - more if more < have else have + more}"),
                    (
                        f"{have} + {have - more if more < have else have + more} ="
                        f" {2 * have - more if more < have else 2 * have + more}"
                    ),
                ],
                f"{2 * have - more if more < have else 2 * have + more} {things}",
            ),
            Problem(
                f"There are {legs} {plural} and {boxes} hens on a farm. How many legs do they have?",
                [
                    f"{legs} * 4 = {legs * 4}",
                    f"{boxes} * 2 = {boxes * 2}",
                    f"{legs * 4} + {boxes * 2} = {legs * 4 + boxes * 2}",
                ],
                f"{legs * 4 + boxes * 2} legs",
            ),
            Problem(
                f"A train drives {per * 10} km in one hour. How far does it drive in {boxes} hours?",
                [f"{per * 10} * {boxes} = {per * 10 * boxes}"],
                f"{per * 10 * boxes} km",
            ),
        ]
    )


GENERATORS: tuple[Callable[[random.Random], Problem], ...] = (
    addition,
    subtraction,
    carrying,
    multiplication,
    times_table,
    division,
    order_of_operations,
    chain_of_sums,
    linear_equation,
    both_sides,
    sum_and_difference,
    quadratic,
    expand_brackets,
    fractions,
    simplify_fraction,
    compare_fractions,
    percentage,
    sequence,
    greatest_divisor,
    prime_factors,
    shape,
    average,
    clock,
    order_numbers,
    substitution,
    derivative,
    spelled,
    rounding,
    shop,
    shop,
    word_problem,
    word_problem,
    word_problem,
)


def problem(rng: random.Random) -> Problem:
    """Draw one problem of any kind."""
    return rng.choice(GENERATORS)(rng)


def maths(rng: random.Random) -> str:
    """Write one problem as a line with the question, a line for each step and a line ``Answer: ...``."""
    question, steps, answer = problem(rng)
    return "\n".join([f"Problem: {question}", *steps, f"Answer: {answer}"])
