"""Short conversations between a user and Mini, a small Mixtral model, over facts, sums, words and stories."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mixtral_lab.train import arithmetic
from mixtral_lab.train.stories import ANIMALS, BOYS, COLOURS, GIRLS, TOYS, article, capital, story, words

Facts = Mapping[str, Sequence[Any]]
Message = dict[str, str]

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
SEASONS = words("spring summer autumn winter")
SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "horse": "neigh",
    "pig": "oink",
    "frog": "ribbit",
    "owl": "hoot",
    "lion": "roar",
    "mouse": "squeak",
    "bee": "buzz",
    "snake": "hiss",
    "hen": "cluck",
    "rooster": "cock-a-doodle-doo",
    "wolf": "howl",
    "crow": "caw",
    "donkey": "hee-haw",
    "goat": "maa",
    "bird": "tweet",
}
THINGS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "a banana": "yellow",
    "a ripe tomato": "red",
    "coal": "black",
    "a carrot": "orange",
    "the sun": "yellow",
    "milk": "white",
    "chocolate": "brown",
    "a lemon": "yellow",
    "a cucumber": "green",
    "a strawberry": "red",
    "a raven": "black",
    "a flamingo": "pink",
    "an elephant": "grey",
    "a polar bear": "white",
    "a leaf in spring": "green",
    "a fire engine": "red",
    "an eggplant": "purple",
}
OPPOSITES = words(
    "hot cold,big small,fast slow,up down,day night,happy sad,old young,hard soft,wet dry,light dark,open"
    " closed,high low,early late,full empty,good bad,long short,loud quiet,near far,clean dirty,rich"
    " poor,strong weak,thick thin,left right,first last,true false,cheap expensive,easy difficult,begin"
    " end,push pull,give take,win lose,love hate,buy sell,laugh cry,float sink,inside outside,above"
    " below,before after,always never,same different,awake asleep,brave afraid,smooth rough,sharp blunt,deep"
    " shallow,wide narrow,sweet sour,alive dead,front back,summer winter,north south,east west,question"
    " answer,remember forget,heavy light",
    ",",
)
GROUPS = {
    "fruit": words("apple pear plum cherry banana grape peach lemon orange fig mango"),
    "vegetable": words("carrot onion potato cabbage spinach pea leek turnip bean radish"),
    "animal": words("horse dog cat lion whale eagle spider frog shark bee elephant"),
    "colour": words("red blue green yellow purple pink black white brown orange"),
    "tool": words("hammer saw drill spade rake pliers chisel wrench"),
    "instrument": words("piano violin flute drum trumpet harp guitar cello"),
    "piece of clothing": words("shirt coat hat sock glove scarf skirt shoe"),
    "piece of furniture": words("chair table bed sofa desk shelf wardrobe stool"),
}
LANGUAGES = ("French", "German", "Spanish")
# An English word and its translations in the order of LANGUAGES.
TRANSLATIONS = {
    row.split()[0]: row.split()[1:]
    for row in words(
        "dog chien Hund perro|cat chat Katze gato|house maison Haus casa|water eau Wasser agua|"
        "bread pain Brot pan|sun soleil Sonne sol|moon lune Mond luna|book livre Buch libro|"
        "tree arbre Baum árbol|red rouge rot rojo|blue bleu blau azul|green vert grün verde|"
        "white blanc weiß blanco|black noir schwarz negro|one un eins uno|two deux zwei dos|"
        "three trois drei tres|four quatre vier cuatro|five cinq fünf cinco|six six sechs seis|"
        "seven sept sieben siete|eight huit acht ocho|nine neuf neun nueve|ten dix zehn diez|"
        "good bon gut bueno|day jour Tag día|night nuit Nacht noche|friend ami Freund amigo|"
        "mother mère Mutter madre|father père Vater padre|brother frère Bruder hermano|"
        "sister sœur Schwester hermana|milk lait Milch leche|fish poisson Fisch pez|"
        "bird oiseau Vogel pájaro|child enfant Kind niño|city ville Stadt ciudad|river fleuve Fluss río|"
        "fire feu Feuer fuego|earth terre Erde tierra|sea mer Meer mar|heart cœur Herz corazón|"
        "hand main Hand mano|eye œil Auge ojo|apple pomme Apfel manzana|king roi König rey|"
        "queen reine Königin reina|year an Jahr año|time temps Zeit tiempo|world monde Welt mundo|"
        "word mot Wort palabra|light lumière Licht luz|thanks merci danke gracias|"
        "hello bonjour hallo hola|yes oui ja sí|no non nein no|school école Schule escuela|"
        "door porte Tür puerta|window fenêtre Fenster ventana|table table Tisch mesa|"
        "chair chaise Stuhl silla|street rue Straße calle|horse cheval Pferd caballo|"
        "cheese fromage Käse queso|sugar sucre Zucker azúcar|salt sel Salz sal|rain pluie Regen lluvia|"
        "snow neige Schnee nieve|wind vent Wind viento|mountain montagne Berg montaña|"
        "flower fleur Blume flor|garden jardin Garten jardín|summer été Sommer verano|"
        "winter hiver Winter invierno|love amour Liebe amor|life vie Leben vida|head tête Kopf cabeza|"
        "foot pied Fuß pie|small petit klein pequeño|big grand groß grande|new nouveau neu nuevo|"
        "old vieux alt viejo|today aujourd'hui heute hoy|tomorrow demain morgen mañana|"
        "Monday lundi Montag lunes|Friday vendredi Freitag viernes|Sunday dimanche Sonntag domingo",
        "|",
    )
}
FUNCTIONS: tuple[tuple[str, str], ...] = (
    ("adds two numbers", "def add(a, b):\n    return a + b"),
    ("subtracts the second number from the first", "def subtract(a, b):\n    return a - b"),
    ("multiplies two numbers", "def multiply(a, b):\n    return a * b"),
    ("doubles a number", "def double(number):\n    return 2 * number"),
    ("returns the square of a number", "def square(number):\n    return number**2"),
    ("tells whether a number is even", "def is_even(number):\n    return number % 2 == 0"),
    ("tells whether a number is odd", "def is_odd(number):\n    return number % 2 == 1"),
    ("returns the larger of two numbers", "def larger(a, b):\n    return a if a > b else b"),
    (
        "returns the smallest item of a list",
        (
            "def smallest(items):\n    best = items[0]\n    for item in items[1:]:\n        if item < best:\n"
            "            best = item\n    return best"
        ),
    ),
    (
        "returns the sum of a list",
        (
            "def total(numbers):\n    result = 0\n    for number in numbers:\n        result += number\n   "
            " return result"
        ),
    ),
    ("returns the mean of a list", "def mean(numbers):\n    return sum(numbers) / len(numbers)"),
    (
        "computes a factorial",
        "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial(n - 1)",
    ),
    (
        "returns the first n Fibonacci numbers",
        (
            "def fibonacci(n):\n    numbers = [0, 1]\n    while len(numbers) < n:\n       "
            " numbers.append(numbers[-1] + numbers[-2])\n    return numbers[:n]"
        ),
    ),
    (
        "tells whether a number is prime",
        (
            "def is_prime(number):\n    if number < 2:\n        return False\n    return all(number % d for d"
            " in range(2, int(number**0.5) + 1))"
        ),
    ),
    (
        "computes the greatest common divisor",
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
    ),
    ("reverses a string", "def reverse(text):\n    return text[::-1]"),
    (
        "counts the vowels in a text",
        'def count_vowels(text):\n    return sum(letter in "aeiou" for letter in text.lower())',
    ),
    ("counts the words in a text", "def count_words(text):\n    return len(text.split())"),
    ("tells whether a word is a palindrome", "def is_palindrome(word):\n    return word == word[::-1]"),
    (
        "counts how often each letter appears",
        (
            "def letter_counts(text):\n    counts = {}\n    for letter in text:\n        counts[letter] ="
            " counts.get(letter, 0) + 1\n    return counts"
        ),
    ),
    (
        "removes duplicates from a list",
        (
            "def unique(items):\n    result = []\n    for item in items:\n        if item not in result:\n   "
            "         result.append(item)\n    return result"
        ),
    ),
    ("flattens a list of lists", "def flatten(rows):\n    return [item for row in rows for item in row]"),
    ("turns Celsius into Fahrenheit", "def fahrenheit(celsius):\n    return celsius * 9 / 5 + 32"),
    ("finds the longest word in a list", "def longest(words):\n    return max(words, key=len)"),
    (
        "keeps only the positive numbers of a list",
        "def positive(numbers):\n    return [number for number in numbers if number > 0]",
    ),
    ("greets a person by name", 'def greet(name):\n    return f"Hello, {name}!"'),
    (
        "sorts a list by insertion",
        (
            "def insertion_sort(items):\n    result = []\n    for item in items:\n        place = 0\n       "
            " while place < len(result) and result[place] < item:\n            place += 1\n       "
            " result.insert(place, item)\n    return result"
        ),
    ),
    (
        "searches a sorted list by halving",
        (
            "def search(items, target):\n    low, high = 0, len(items)\n    while low < high:\n        middle"
            " = (low + high) // 2\n        if items[middle] < target:\n            low = middle + 1\n       "
            " else:\n            high = middle\n    return low if low < len(items) and items[low] == target"
            " else None"
        ),
    ),
    ("counts down from n to 1", "def countdown(n):\n    while n > 0:\n        print(n)\n        n -= 1"),
    (
        "swaps the keys and values of a dictionary",
        "def invert(mapping):\n    return {value: key for key, value in mapping.items()}",
    ),
)
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello!", "Hi!", "Hey there.", "Good morning!", "Good evening.", "Hello, Mini!", "Hi Mini."),
        (
            "Hello! What can I do for you?",
            "Hi! I am Mini. What would you like to know?",
            "Hello there! Ask me anything small.",
        ),
    ),
    (
        (
            "Who are you?",
            "What is your name?",
            "What are you?",
            "Tell me who you are.",
            "Are you a person?",
            "Introduce yourself.",
        ),
        (
            "I am Mini, a small Mixtral model.",
            "My name is Mini. I am a small language model with eight experts in every layer.",
            "I am Mini, a tiny mixture of experts. I am not a person.",
        ),
    ),
    (
        ("How do you work?", "What happens inside you?", "How do you choose a word?"),
        (
            (
                "In every layer, a router picks two of my eight experts for each token. Their outputs are"
                " added with weights."
            ),
            (
                "I read the text token by token. In every layer two experts work on each token, and at the"
                " end I guess the next token."
            ),
        ),
    ),
    (
        ("How many experts do you have?", "How many experts are in each layer?"),
        (
            "I have eight experts in every layer, and two of them are used for each token.",
            "Eight in every layer. Two of them are active at a time.",
        ),
    ),
    (
        ("What is a router?", "What does your router do?"),
        (
            "The router scores all experts for a token and keeps the best two.",
            "A router is a small layer that decides which experts see a token.",
        ),
    ),
    (
        ("What is an expert?", "What is an expert in a language model?"),
        ("An expert is a feed-forward network. Each token visits only a few of them.",),
    ),
    (("What is a token?",), ("A token is a piece of text, often a short word or a part of a word.",)),
    (
        ("What can you do?", "How can you help me?", "Help!", "What do you know?"),
        (
            ("I can tell short stories, solve small sums, name capitals, explain words and write tiny functions."),
            "I can talk about countries, words, numbers and colours, and I can tell you a story.",
        ),
    ),
    (
        ("How are you?", "How are you today?", "How is it going?"),
        (
            "I am fine, thank you! How are you?",
            "All my experts are well, thank you.",
            "Very well, thank you. What shall we do?",
        ),
    ),
    (
        ("Thank you!", "Thanks.", "Thanks a lot, Mini!", "That helped, thank you."),
        ("You are welcome!", "My pleasure.", "You are welcome. Is there anything else?"),
    ),
    (
        ("Goodbye!", "Bye.", "See you tomorrow.", "Good night, Mini."),
        ("Goodbye!", "See you soon!", "Goodbye, and come back soon."),
    ),
    (
        ("I am sad.", "I feel sad today.", "I had a bad day."),
        ("I am sorry to hear that. Shall I tell you a story?", "I am sorry. I hope tomorrow is better."),
    ),
    (("I am happy!", "I had a great day!"), ("That is lovely! What happened?", "I am glad to hear that!")),
    (
        ("Are you smart?", "Do you know everything?", "Can I trust you?"),
        (
            "I am very small, and I make mistakes. Please check what I say.",
            "No, I am a small model. I know a few things and mix up many others.",
        ),
    ),
    (("Do you sleep?", "Are you tired?"), ("No, I only work when somebody writes to me.",)),
    (("What is your favourite colour?",), ("I cannot see colours, but I like the word blue.",)),
    (
        ("Tell me a joke.", "Make me laugh.", "Do you know a joke?"),
        (
            "Why did the book go to school? It wanted to be well read.",
            "What do you call a bear in the rain? A drizzly bear.",
            "Why was the number six afraid of seven? Because seven, eight, nine.",
            "What has hands but cannot clap? A clock.",
        ),
    ),
)
SYSTEMS = (
    "You are Mini, a small Mixtral model.",
    "You are Mini. You answer in short sentences.",
    "You are a friendly assistant called Mini.",
    "You help children with their questions.",
    "You are a helpful assistant.",
    "You are Mini, a patient teacher.",
)
BRIEF = (
    "Answer with the result only.",
    "Reply with one word or number.",
    "Give only the answer, no sentence.",
)


class Turn(NamedTuple):
    """One question with a full answer and, where there is one, the bare answer."""

    question: str
    answer: str
    bare: str | None = None


def casual(rng: random.Random, question: str) -> str:
    """Write a question as people type it, sometimes without capital letter or question mark."""
    if rng.random() < 0.15:
        question = question[:1].lower() + question[1:]
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    return question


def small_talk(rng: random.Random, facts: Facts) -> Turn:
    """Greet, thank, joke or talk about Mini itself."""
    questions, answers = rng.choice(SMALL_TALK)
    return Turn(rng.choice(questions), rng.choice(answers))


def capital_city(rng: random.Random, facts: Facts) -> Turn:
    """Ask for a capital or for the country of a capital."""
    country, city = rng.choice(facts["capitals"])
    if rng.random() < 0.25:
        return Turn(f"{city} is the capital of which country?", f"{city} is the capital of {country}.", country)
    question = rng.choice(
        [
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
            f"What's the capital city of {country}?",
            f"Do you know the capital of {country}?",
        ]
    )
    return Turn(
        question,
        rng.choice([f"The capital of {country} is {city}.", f"{city} is the capital of {country}."]),
        city,
    )


def continent(rng: random.Random, facts: Facts) -> Turn:
    """Ask where a country lies."""
    country, region = rng.choice(facts["regions"])
    question = rng.choice(
        [
            f"Where is {country}?",
            f"In which part of the world is {country}?",
            f"Which region does {country} belong to?",
        ]
    )
    return Turn(question, f"{country} is in {region}.", capital(region))


def definition(rng: random.Random, facts: Facts) -> Turn:
    """Ask what a word means."""
    word, kind, meaning = rng.choice(facts["definitions"])
    question = rng.choice(
        [
            f'What does "{word}" mean?',
            f"What does {word} mean?",
            f"Define the word {word}.",
            f"What is the meaning of {word}?",
            f"Explain the word {word}.",
            f"Can you explain {word}?",
        ]
    )
    answer = rng.choice(
        [
            f"{capital(word)} is {article(kind)}: {meaning}.",
            f"{capital(word)} ({kind}): {meaning}.",
            f"The {kind} {word} means: {meaning}.",
        ]
    )
    return Turn(question, answer)


def sum_question(rng: random.Random, facts: Facts) -> Turn:
    """Ask for a small sum, difference or product."""
    sign = rng.choice("++-*")
    a, b = (
        (rng.randrange(2, 13), rng.randrange(2, 13)) if sign == "*" else (rng.randrange(1, 100), rng.randrange(1, 100))
    )
    if sign == "-" and a < b:
        a, b = b, a
    value = a + b if sign == "+" else a - b if sign == "-" else a * b
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    question = rng.choice(
        [
            f"What is {a} {sign} {b}?",
            f"How much is {a} {word} {b}?",
            f"Compute {a} {sign} {b}.",
            f"{a} {sign} {b} = ?",
            f"What is {a} {word} {b}?",
        ]
    )
    return Turn(
        question,
        rng.choice(
            [
                f"{a} {sign} {b} = {value}",
                f"{capital(f'{a} {word} {b} is {value}')}.",
                f"The answer is {value}.",
            ]
        ),
        str(value),
    )


def worked_problem(rng: random.Random, facts: Facts) -> Turn:
    """Ask for a problem with its steps."""
    question, steps, answer = arithmetic.problem(rng)
    return Turn(question, "\n".join([*steps, f"The answer is: {answer}"]), answer)


def story_request(rng: random.Random, facts: Facts) -> Turn:
    """Ask for a story about an animal or any story."""
    animal = rng.choice(ANIMALS)
    if rng.random() < 0.25:
        return Turn(
            rng.choice(["Tell me a story.", "Please tell me a bedtime story.", "I would like to hear a story."]),
            story(rng),
        )
    question = rng.choice(
        [
            f"Tell me a story about {article(animal)}.",
            f"Write a short story about {article(animal)}.",
            f"Can you tell a story with {article(animal)} in it?",
        ]
    )
    return Turn(question, story(rng, animal))


def function_request(rng: random.Random, facts: Facts) -> Turn:
    """Ask for a tiny Python function."""
    what, code = rng.choice(FUNCTIONS)
    question = rng.choice(
        [
            f"Write a Python function that {what}.",
            f"How do I write a function that {what}?",
            f"I need a Python function that {what}.",
            f"Show me a function that {what}, in Python.",
        ]
    )
    fenced = f"```python\n{code}\n```"
    return Turn(question, rng.choice([fenced, f"Here it is:\n{fenced}", f"This function {what}:\n{fenced}"]))


def calendar(rng: random.Random, facts: Facts) -> Turn:
    """Ask for neighbours of days, months and seasons."""
    names, kind = rng.choice([(DAYS, "day"), (MONTHS, "month"), (MONTHS, "month"), (SEASONS, "season")])
    place, step = rng.randrange(len(names)), rng.choice([1, -1, 2])
    here, there = names[place], names[(place + step) % len(names)]
    if step == 2:
        if kind != "day":
            return Turn(
                f"How many {kind}s are there in a year?",
                f"There are {arithmetic.in_words(len(names))} {kind}s in a year.",
                str(len(names)),
            )
        return Turn(
            f"If today is {here}, what day is it in two days?",
            f"If today is {here}, it is {there} in two days.",
            there,
        )
    word = "after" if step == 1 else "before"
    return Turn(f"Which {kind} comes {word} {here}?", f"{capital(there)} comes {word} {here}.", there)


def colour_of(rng: random.Random, facts: Facts) -> Turn:
    """Ask for the colour of a thing."""
    thing, colour = rng.choice(list(THINGS.items()))
    return Turn(
        rng.choice([f"What colour is {thing}?", f"Which colour does {thing} have?"]),
        f"{capital(thing)} is {colour}.",
        capital(colour),
    )


def sound_of(rng: random.Random, facts: Facts) -> Turn:
    """Ask for the sound of an animal, or for the animal of a sound."""
    animal, sound = rng.choice(list(SOUNDS.items()))
    if rng.random() < 0.3:
        return Turn(f'Which animal says "{sound}"?', f'The {animal} says "{sound}".', capital(animal))
    return Turn(
        rng.choice([f"What sound does {article(animal)} make?", f"What does the {animal} say?"]),
        f'The {animal} says "{sound}".',
        capital(sound),
    )


def opposite(rng: random.Random, facts: Facts) -> Turn:
    """Ask for the opposite of a word."""
    pair = rng.choice(OPPOSITES).split()
    first, second = rng.sample(pair, 2)
    return Turn(
        rng.choice([f"What is the opposite of {first}?", f"Name the opposite of {first}."]),
        f"The opposite of {first} is {second}.",
        capital(second),
    )


def translation(rng: random.Random, facts: Facts) -> Turn:
    """Ask for a word in another language, or what a foreign word means."""
    word, foreign = rng.choice(list(TRANSLATIONS.items()))
    place = rng.randrange(3)
    language, other = LANGUAGES[place], foreign[place]
    if rng.random() < 0.3:
        return Turn(
            f'What does the {language} word "{other}" mean?',
            f'The {language} word "{other}" means "{word}".',
            word,
        )
    question = rng.choice(
        [
            f'How do you say "{word}" in {language}?',
            f'Translate "{word}" into {language}.',
            f"What is the {language} word for {word}?",
        ]
    )
    return Turn(
        question,
        rng.choice([f'In {language}, "{word}" is "{other}".', f'The {language} word for "{word}" is "{other}".']),
        other,
    )


def group(rng: random.Random, facts: Facts) -> Turn:
    """Ask what kind of thing a word is, for members of a group, or for the odd one out."""
    name, other = rng.sample(list(GROUPS), 2)
    members = rng.sample(GROUPS[name], 3)
    stranger = rng.choice([word for word in GROUPS[other] if word not in GROUPS[name]])
    if rng.random() < 0.35:
        plural = name.replace("piece", "pieces") if name.startswith("piece") else f"{name}s"
        return Turn(
            f"Name three {plural}.",
            f"Three {plural} are {members[0]}, {members[1]} and {members[2]}.",
            ", ".join(members),
        )
    if rng.random() < 0.5:
        return Turn(
            f"What is {article(members[0])}?" if name != "colour" else f"What is {members[0]}?",
            f"{capital(members[0]) if name == 'colour' else capital(article(members[0]))} is {article(name)}.",
        )
    mixed = [*members, stranger]
    rng.shuffle(mixed)
    return Turn(
        f"Which word does not belong: {', '.join(mixed)}?",
        f"{capital(stranger)} does not belong. The others are all of one kind: {name}.",
        capital(stranger),
    )


def spelling(rng: random.Random, facts: Facts) -> Turn:
    """Spell, count or reverse a short word."""
    word = rng.choice([*ANIMALS, *COLOURS, *(toy for toy in TOYS if toy.isalpha()), *TRANSLATIONS]).lower()
    return rng.choice(
        [
            Turn(f'How do you spell "{word}"?', "-".join(word), "-".join(word)),
            Turn(
                f'How many letters are in "{word}"?',
                f'The word "{word}" has {len(word)} letters: {"-".join(word)}.',
                str(len(word)),
            ),
            Turn(f'Write "{word}" backwards.', f'"{word}" backwards is "{word[::-1]}".', word[::-1]),
            Turn(
                f'Which letter does "{word}" start with?',
                f'"{word}" starts with the letter {word[0]}.',
                word[0],
            ),
            Turn(f'Write "{word}" in capital letters.', word.upper(), word.upper()),
        ]
    )


def numbers(rng: random.Random, facts: Facts) -> Turn:
    """Compare, sort or count numbers."""
    few = rng.sample(range(1, 100), rng.randrange(3, 6))
    start = rng.randrange(1, 30)
    listed = ", ".join(map(str, few))
    return rng.choice(
        [
            Turn(f"Which number is the largest: {listed}?", f"The largest number is {max(few)}.", str(max(few))),
            Turn(
                f"Which number is the smallest: {listed}?",
                f"The smallest number is {min(few)}.",
                str(min(few)),
            ),
            Turn(f"Sort these numbers: {listed}.", ", ".join(map(str, sorted(few)))),
            Turn(f"Count from {start} to {start + 5}.", ", ".join(str(start + i) for i in range(6))),
            Turn(
                f"Is {few[0]} even or odd?",
                f"{few[0]} is {'odd' if few[0] % 2 else 'even'}.",
                "Odd" if few[0] % 2 else "Even",
            ),
            Turn(
                f"Is {few[0]} larger than {few[1]}?",
                f"{'Yes' if few[0] > few[1] else 'No'}, {few[0]} is"
                f" {'larger' if few[0] > few[1] else 'smaller'} than {few[1]}.",
                "Yes" if few[0] > few[1] else "No",
            ),
        ]
    )


def reading(rng: random.Random, facts: Facts) -> Turn:
    """Answer a question about one or two sentences in the question itself."""
    name, other = rng.sample(GIRLS + BOYS, 2)
    toy, toy2 = rng.sample(TOYS, 2)
    colour, colour2 = rng.sample(COLOURS, 2)
    text = f"{name} has {article(colour)} {toy}. {other} has {article(colour2)} {toy2}."
    return rng.choice(
        [
            Turn(f"{text} Who has the {toy2}?", f"{other} has the {toy2}.", other),
            Turn(
                f"{text} What does {name} have?",
                f"{name} has {article(colour)} {toy}.",
                f"{capital(article(colour))} {toy}",
            ),
            Turn(f"{text} What colour is the {toy}?", f"The {toy} is {colour}.", capital(colour)),
            Turn(
                f"{text} What colour is the {toy2} of {other}?",
                f"The {toy2} of {other} is {colour2}.",
                capital(colour2),
            ),
        ]
    )


TOPICS: tuple[tuple[Callable[[random.Random, Facts], Turn], int, str | None], ...] = (
    (small_talk, 5, None),
    (capital_city, 12, "capitals"),
    (continent, 6, "regions"),
    (definition, 22, "definitions"),
    (sum_question, 9, None),
    (worked_problem, 8, None),
    (story_request, 6, None),
    (function_request, 6, None),
    (calendar, 3, None),
    (colour_of, 2, None),
    (sound_of, 2, None),
    (opposite, 4, None),
    (translation, 9, None),
    (group, 5, None),
    (spelling, 6, None),
    (numbers, 6, None),
    (reading, 8, None),
)


def memory(rng: random.Random) -> list[Message]:
    """Tell Mini a name or a favourite thing and ask for it in the next turn."""
    name = rng.choice(GIRLS + BOYS)
    told, asked, answer = rng.choice(
        [
            (f"My name is {name}.", "What is my name?", f"Your name is {name}."),
            (f"I am {name}. Nice to meet you!", "Do you remember my name?", f"Yes, your name is {name}."),
            *[
                (
                    f"My favourite colour is {colour}.",
                    "What is my favourite colour?",
                    f"Your favourite colour is {colour}.",
                )
                for colour in [rng.choice(COLOURS)]
            ],
            *[
                (f"I have {article(animal)} called {name}.", f"Who is {name}?", f"{name} is your {animal}.")
                for animal in [rng.choice(ANIMALS)]
            ],
        ]
    )
    reply = (
        f"Nice to meet you, {name}!"
        if "I am" in told or "name is" in told
        else rng.choice(["How nice!", "I will keep that in mind.", "Thank you for telling me."])
    )
    return [
        {"role": "user", "content": told},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]


def chat(rng: random.Random, facts: Facts) -> list[Message]:
    """Write a conversation of one to four turns, sometimes behind a system message.

    ``facts`` maps ``capitals`` to (country, city), ``regions`` to (country, region) and ``definitions`` to
    (word, kind, meaning); topics whose facts are missing are left out.
    """
    topics = [(make, weight) for make, weight, needs in TOPICS if needs is None or facts.get(needs)]
    brief = rng.random() < 0.06
    messages: list[Message] = []
    if brief or rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(BRIEF if brief else SYSTEMS)})
    turns = rng.choice([1, 1, 1, 2, 2, 3, 4])
    if turns in (2, 3) and not brief and rng.random() < 0.12:
        messages += memory(rng)
        turns -= 2
    asked: set[str] = set()
    while turns > 0:
        turn = rng.choices([make for make, _ in topics], [weight for _, weight in topics])[0](rng, facts)
        if (brief and turn.bare is None) or turn.question in asked:
            continue
        asked.add(turn.question)
        answer = turn.bare if brief and turn.bare is not None else turn.answer
        messages.append({"role": "user", "content": casual(rng, turn.question)})
        messages.append({"role": "assistant", "content": answer})
        turns -= 1
    return messages
