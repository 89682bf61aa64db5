"""Short children's stories: eighteen plots over a small cast, told in simple English.

Every plot is a function that takes a ``Tale`` (who, where, with what) and returns the sentences of its middle
part. The same names, objects and places are used from the first sentence to the last, so a model can learn to
keep track of them.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def words(text: str, separator: str | None = None) -> list[str]:
    """Cut a table that is written as one string into its words."""
    return text.split(separator)


GIRLS = words(
    "Ada Bea Cora Della Edie Flora Gia Hattie Inez Josie Kira Lena Mina Noor Opal Petra Quinn Rhea Selma Tess"
    " Uma Vera Wanda Yara Zora Alma Betsy Celia Dora Elsa Frida Gwen Holly Iris Judy Kaya Lotte Maud Nell"
    " Oona"
)
BOYS = words(
    "Abel Bo Caleb Dario Emil Felix Gus Hank Igor Jude Karl Lars Milo Nate Otto Pablo Remy Saul Toby Umar "
    "Vic Wes Xavi Yusuf Zane Arlo Boris Cyrus Dov Eddie Fritz Gil Hari Ike Joel Kofi Lou Mateo Nils Omri"
)
ANIMAL_NAMES = words(
    "Acorn Bubbles Chestnut Dusty Ember Fidget Ginger Hopper Inky Jumble Kipper Lollipop Muffin Nibbles Oats "
    "Pebble Quill Ripple Snippet Thistle Twig Velvet Waffle Whisper Yarrow Zigzag Barley Cricket Dapple Echo"
)
ANIMALS = words(
    "mouse rabbit fox bear owl duck frog squirrel hedgehog turtle cat puppy goat pony hen sparrow otter"
    " badger lamb beaver snail mole donkey robin penguin koala lizard piglet"
)
COLOURS = words("red blue green yellow purple orange pink white brown golden silver grey")
TOYS = words(
    "ball|kite|drum|wooden boat|whistle|puzzle|toy train|teddy bear|paper plane|spinning top|jump"
    " rope|marble|toy"
    " car|wagon|yo-yo|flute|bell|lantern|umbrella|hat|scarf|button|basket|paintbrush|map|key|cup|blanket",
    "|",
)
PLACES = words(
    "the pond|the old mill|the hill|the orchard|the beach|the river|the village square|the big oak tree|"
    "the meadow|the barn|the library|the bakery|the bridge|the playground|the lighthouse|the garden gate|"
    "the train station|the duck pond|the pine forest|the market",
    "|",
)
FOODS = words(
    "bread|plum jam|soup|pancakes|apple cake|cheese|honey buns|berry pie|porridge|corn cakes|carrot cake|"
    "lemon cookies|pear tart|nut bread|rice pudding|tomato soup",
    "|",
)
FRUITS = words("apples pears plums cherries grapes oranges berries figs peaches lemons")
TRAITS = words("kind brave clever shy funny quiet curious gentle cheerful careful patient playful stubborn dreamy")
LOW = words("sad worried upset lonely unhappy gloomy disappointed")
HIGH = words("happy glad proud cheerful thankful pleased delighted")
WEATHER = words("sunny windy rainy snowy cloudy warm cold foggy stormy bright")
TIMES = ["morning", "afternoon", "day", "evening", "Saturday", "Sunday", "spring morning", "autumn day"]
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
FAMILY = ["mother", "father", "grandmother", "grandfather", "big sister", "big brother", "aunt", "uncle"]


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    """Return the noun with ``a`` or ``an`` before it, for example ``an owl``."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


@dataclass(frozen=True)
class Person:
    """A character with a name, a kind (girl, boy or an animal) and pronouns."""

    name: str
    kind: str
    he: str
    him: str
    his: str

    @property
    def He(self) -> str:  # noqa: N802 - the capital letter is the meaning
        """Return the pronoun as it opens a sentence."""
        return capital(self.he)


def person(rng: random.Random, taken: Sequence[str] = (), kind: str | None = None) -> Person:
    """Draw a character whose name is not taken; ``kind`` asks for a certain animal."""
    feminine = rng.random() < 0.5
    if kind is None and rng.random() < 0.62:
        names, kind = (GIRLS, "girl") if feminine else (BOYS, "boy")
    else:
        names, kind = ANIMAL_NAMES, kind or rng.choice(ANIMALS)
    name = rng.choice([name for name in names if name not in taken])
    return Person(name, kind, *(("she", "her", "her") if feminine else ("he", "him", "his")))


class Tale:
    """The cast and the props of one story, drawn once so that they stay the same throughout."""

    def __init__(self, rng: random.Random, kind: str | None = None) -> None:
        self.rng = rng
        self.hero = person(rng, kind=kind)
        self.friend = person(rng, [self.hero.name])
        self.other = person(rng, [self.hero.name, self.friend.name])
        self.colour, self.colour2 = rng.sample(COLOURS, 2)
        self.toy, self.toy2, self.toy3 = rng.sample(TOYS, 3)
        self.place, self.place2, self.place3 = rng.sample(PLACES, 3)
        self.food, self.food2 = rng.sample(FOODS, 2)
        self.fruit, self.fruit2 = rng.sample(FRUITS, 2)
        self.trait, self.trait2 = rng.sample(TRAITS, 2)
        self.low, self.high, self.high2 = rng.choice(LOW), *rng.sample(HIGH, 2)
        self.weather, self.time = rng.choice(WEATHER), rng.choice(TIMES)
        self.elder = rng.choice(FAMILY)
        self.count = rng.randrange(3, 8)

    def pick(self, *options: str) -> str:
        """Return one of several ways to say the same thing."""
        return self.rng.choice(options)

    def maybe(self, text: str, chance: float = 0.5) -> str:
        """Return the text or, some of the time, nothing."""
        return text if self.rng.random() < chance else ""


def kite_in_tree(t: Tale) -> list[str]:
    """A thing is out of reach and two friends reach it together."""
    a, b = t.hero, t.friend
    tree = t.pick("the tall elm", "the roof of the shed", "the oldest tree on the street", "the top of the wall")
    return [
        f"{a.name} was playing with {a.his} {t.colour} {t.toy}.",
        (
            f"{t.pick('A gust of wind came', 'A loud whoosh came', 'A big bird flew past')} and "
            f"{t.pick('took', 'carried', 'pulled')} the {t.toy} up, up, up, until it was stuck on {tree}."
        ),
        f"{a.name} jumped, but {a.he} could not reach it. {a.He} felt {t.low}.",
        f"Then {b.name}, {article(t.trait2)} {b.kind}, came along the path.",
        (
            '"' + t.pick("What are you looking at?", "Why are you staring up there?", "Did you lose something?") + '"'
            f" asked {b.name}."
        ),
        f'"My {t.toy} is up there, and I am too short," said {a.name}.',
        (f'{b.name} looked up, too. "I am too short as well," said {b.name}, "but we are tall if we work together."'),
        (
            t.pick(
                f"{a.name} climbed on the shoulders of {b.name}",
                f"{b.name} held the old ladder and {a.name} climbed up",
                f"They piled up {NUMBERS[t.count]} boxes and {a.name} climbed on top",
            )
            + "."
        ),
        f"{a.He} stretched out {a.his} arm and {t.pick('touched', 'tapped')} the {t.toy}. Down it came!",
        (
            f"{t.pick('They both laughed', 'They danced in a circle', 'They shook hands')}, and then they"
            f" took turns with the {t.colour} {t.toy} until"
            f" {t.pick('supper', 'the stars came out', 'it was time to go')}."
        ),
    ]


def foggy_night(t: Tale) -> list[str]:
    """Somebody is lost in the fog and follows a sound or a light home."""
    a, b = t.hero, t.friend
    signal = t.pick("rang a bell", "beat a drum", "swung a lamp", "sang a loud song", "banged on a pot")
    return [
        f"One evening {a.name} stayed too long at {t.place}.",
        f"The fog came down, thick and {t.pick('grey', 'white')}. {a.name} could not see {a.his} own feet.",
        f'"{t.pick("Which way is home?", "Where is the path?", "Oh dear, I am lost.")}" {a.he} whispered.',
        (f"{a.He} took {NUMBERS[t.count]} steps one way and {NUMBERS[t.count]} steps back. {a.He} was {t.low}."),
        f"At home, {b.name} looked at the clock. {a.name} was late.",
        f'"I will not wait any longer," said {b.name}, and {b.he} went to the door and {signal}.',
        f"Far away in the fog, {a.name} {t.pick('stopped', 'stood still', 'turned around')}. "
        f'"I know that {t.pick("sign", "friend of mine")}!" {a.he} said.',
        (
            f"{a.He} walked slowly, and {t.maybe('very carefully, and ')}{b.name} never stopped until"
            f" {a.name} stood at the door."
        ),
        (
            f"{b.name} gave {a.him} {article(t.colour)} blanket and a bowl of"
            f" {t.pick('hot soup', 'warm milk', 'sweet porridge')}."
        ),
        (
            '"'
            + t.pick("You found me without moving at all", "You were my light", "Thank you for not giving up on me")
            + ',"'
            f" said {a.name}."
        ),
    ]


def strange_noise(t: Tale) -> list[str]:
    """A scary noise at night turns out to be something small."""
    a, b = t.hero, t.friend
    noise = t.pick(
        "tap, tap, tap",
        "scratch, scratch",
        "drip, drop, drip",
        "thump, thump",
        "rustle, rustle",
        "creak, creak",
    )
    culprit = t.pick(
        "a tiny beetle in a matchbox",
        "a branch that touched the window",
        "a hungry little mouse",
        "an open gate in the wind",
        "a leaky tap",
        f"{article(t.colour)} {t.toy} rolling on the floor",
        "a kitten behind the curtain",
    )
    where = t.pick("under the stairs", "in the attic", "behind the big cupboard", "in the cellar", "next to the window")
    return [
        f"It was late, and {a.name} was in bed. Then {a.he} heard it: {noise}.",
        (f'"{t.pick("Who is there?", "What was that?", "Is that a monster?")}" said {a.name}. Nobody answered.'),
        f"{capital(noise)}! {a.name} pulled the blanket over {a.his} head.",
        f'{a.He} ran to the room of {b.name} and shook {b.him}. "Wake up! There is a noise {where}."',
        f'{b.name} was {t.pick("sleepy", "a little scared, too", "not afraid")}. "Let us look," said'
        f" {b.name}. "
        '"' + t.pick("Things are smaller in the light.", "Two are braver than one.", "I will hold your hand.") + '"',
        (
            f"They took a lamp and went {t.pick('on tiptoe', 'slowly', 'step by step')}. {capital(noise)}, it"
            f" went, {where}."
        ),
        f"{a.name} counted to {NUMBERS[t.count]} and held up the lamp.",
        f"It was {culprit}!",
        (f"{a.name} and {b.name} laughed so hard that {t.pick('they woke the whole house', 'they had to sit down')}."),
        f"After that night, {a.name} was not {t.pick('so afraid of', 'scared by')} noises in the dark.",
    ]


def wrong_letter(t: Tale) -> list[str]:
    """A letter for somebody else brings two neighbours together."""
    a, b = t.hero, t.friend
    return [
        (
            f"{capital(article(t.colour))} letter lay in front of the door. {a.name} picked it up and read"
            " the name on it."
        ),
        f'"{b.name}," it said. "But I am not {b.name}!" said {a.name}.',
        (
            t.pick(
                "It would be easy to open it",
                f"{a.name} wanted to know what was inside",
                "The letter smelled of flowers",
            )
            + ","
            f" but {a.he} put it in {a.his} pocket and went out to find {b.name}."
        ),
        f"First {a.he} asked at {t.place}. Nobody there knew {b.name}.",
        (
            f'Then {a.he} asked at {t.place2}. "{b.name} lives {t.pick("behind", "near", "close to")}'
            f' {t.place3}," said'
            f" {article(t.pick('baker', 'farmer', 'teacher', 'fisherman', 'painter', 'gardener'))}."
        ),
        f"So {a.name} walked to {t.place3}, and there was a little house with {article(t.colour2)} door.",
        (f'{a.He} knocked. {capital(article(t.trait2))} {b.kind} opened it. "Are you {b.name}? This is for you."'),
        (
            f'{b.name} read the letter, and {b.his} eyes grew wide. "My {t.elder} is coming to visit!'
            f' {t.pick("Without you I would never know.", "I thought nobody wrote to me anymore.")}"'
        ),
        f"{b.name} asked {a.name} to come in, and they shared some {t.food} at the table.",
        (
            f"The next week, {a.name} got {article(t.colour)} letter, too. This time the name on it was"
            f' "{a.name}". It was from {b.name}.'
        ),
    ]


def practice(t: Tale) -> list[str]:
    """Something is hard at first and easier each time."""
    a, b = t.hero, t.friend
    skill, fail, done = t.rng.choice(
        [
            ("whistle", "only air came out", "a clear, bright tune came out"),
            ("swim", "sank like a stone", "swam all the way to the other side"),
            ("ride a bike", "fell into the grass", "rode all the way down the lane"),
            ("skate", "sat down on the ice with a bump", "made a perfect circle"),
            ("tie a knot", "the rope fell open", "the knot held fast"),
            ("juggle", "dropped every ball", "kept three balls in the air"),
            ("bake", "burned the cake", "made a cake that was soft and sweet"),
            ("read", "mixed up the letters", "read a whole page out loud"),
            ("throw a ball far", "hit the fence", "threw it right over the fence"),
            ("draw a horse", "drew something like a potato", "drew a horse that almost seemed to run"),
        ]
    )
    subject = "" if fail.startswith(("only", "the ")) else f"{a.he} "
    subject2 = "" if done.startswith(("a clear", "the ")) else f"{a.he} "
    return [
        f"More than anything, {a.name} wanted to learn to {skill}.",
        f"On Monday {a.he} tried for the first time. {capital(subject + fail)}.",
        f"On Tuesday {a.he} tried again. Again {subject}{fail}.",
        f'"I will never learn to {skill}," said {a.name}. {a.He} was {t.low}.',
        f"{b.name} {t.pick('sat down next to', 'came over to', 'smiled at')} {a.him}. "
        f'"How many times did you try?" "Two times," said {a.name}.',
        (
            f'"I tried {t.rng.randrange(10, 60)} times before I could do it," said {b.name}. '
            '"'
            + t.pick(
                "Try once more, and I will watch.",
                "Go slowly, and breathe.",
                "Every try teaches you a little.",
            )
            + '"'
        ),
        (f"So {a.name} tried on Wednesday and on Thursday. It was a little better each {t.pick('day', 'time')}."),
        f"On Friday, something {t.pick('wonderful', 'new')} happened: {subject2}{done}!",
        (f'"{t.pick("Did you see that?", "I did it!", "Look, look!")}" cried {a.name}. {b.name} clapped and clapped.'),
        (
            '"' + t.pick("Now you can teach me the next thing", "I knew you could", "That is what trying does") + ',"'
            f" said {b.name}."
        ),
    ]


def picnic(t: Tale) -> list[str]:
    """A picnic goes wrong and becomes better than planned."""
    a, b, c = t.hero, t.friend, t.other
    mishap = t.pick(
        "Ants marched over the cloth, one after another",
        "It began to rain",
        "A goat ate the basket",
        "The basket rolled down the hill",
        "A strong wind blew the plates away",
    )
    return [
        (
            f"{a.name} and {b.name} planned a picnic near {t.place}. {a.name} packed {t.food}, and {b.name}"
            f" packed {t.fruit}."
        ),
        f"{a.name} spread {article(t.colour)} cloth on the ground.",
        f"They were just about to eat when something happened. {mishap}!",
        (
            f'"{t.pick("Our picnic is over", "Everything is ruined", "What a bad day")}," said {b.name}, who'
            f" felt {t.low}."
        ),
        f"{c.name}, {article(t.trait2)} {c.kind} who lived nearby, saw it all from a window.",
        f'"Come in, come in!" called {c.name}. "My table is big, and I have {t.food2}."',
        (
            f"So they sat in the kitchen of {c.name}. They put the {t.fruit} in {article(t.colour2)} bowl,"
            f" and everyone ate {t.food2}."
        ),
        (
            f"{c.name} told"
            " "
            + t.pick(
                "a funny story",
                "them about the old days",
                f"a tale about {article(t.rng.choice(ANIMALS))} who could sing",
            )
            + ","
            f" and {t.pick('they laughed until it was dark', f'{b.name} asked for another one')}."
        ),
        (
            '"'
            + t.pick("This was the best picnic of all", "I am glad it went wrong", "Next time we will plan it here")
            + ',"'
            f" said {a.name} on the way home."
        ),
    ]


def nest(t: Tale) -> list[str]:
    """A small creature has fallen out of its home and is cared for."""
    a, b = t.hero, t.friend
    baby = t.pick("baby bird", "little bat", "baby squirrel", "tiny owl", "young swallow")
    return [
        (f"Under a tree near {t.place}, {a.name} found a {baby}. It was {t.pick('cold', 'shaking', 'very small')}."),
        f"{a.name} looked up. The nest was high above, and {a.he} could not climb so high.",
        (
            f'"I must keep it warm," {a.he} thought. {a.He} put it in {a.his} {t.colour}'
            f" {t.pick('hat', 'scarf', 'cap', 'mitten')}."
        ),
        (f"{a.He} carried it to {b.name}, who knew {t.pick('a lot about animals', 'what every animal needs')}."),
        (
            f'"Give it {t.pick("a little water", "some soft seeds", "warm milk, drop by drop")}," said'
            f' {b.name}, "and let it sleep."'
        ),
        (
            f"For {NUMBERS[t.count]} days {a.name} fed the {baby}. Each day it"
            f" {t.pick('grew a bit', 'was a bit louder', 'opened its eyes wider')}."
        ),
        (
            f'Then {b.name} said, "It is strong enough now. It is time to say goodbye." {a.name} felt'
            f" {t.low}, but {a.he} nodded."
        ),
        (
            f"They went back to the tree near {t.place}. The {baby} looked at {a.name}, and then it"
            " " + t.pick("was gone among the leaves", "went up, branch by branch", "called once and was gone") + "."
        ),
        (
            f"{t.pick('Every morning', 'In the spring', 'Many weeks later')}, {a.name} heard a soft call at"
            f" {a.his} window, and {a.he} knew who it was."
        ),
    ]


def errand(t: Tale) -> list[str]:
    """Three things must be remembered on the way to the market."""
    a, b = t.hero, t.friend
    things = t.rng.sample(
        words(
            "bread|milk|eggs|a candle|a ball of string|honey|a broom|salt|three onions|a jar of jam|cheese|soap|flour",
            "|",
        ),
        3,
    )
    listed = f"{things[0]}, {things[1]} and {things[2]}"
    lost = t.rng.randrange(3)
    kept = [thing for i, thing in enumerate(things) if i != lost]
    return [
        f'The {t.elder} of {a.name} said, "Please go to the market and bring me {listed}."',
        f'"{capital(listed)}," said {a.name}. "That is easy."',
        f'{a.He} sang it on the road: "{capital(listed)}!"',
        (
            f"At {t.place}, {a.he} met {b.name}, who"
            f" {t.pick('had a new joke', f'was playing with a {t.toy}', 'wanted to race to the corner')}."
        ),
        (
            f"{t.pick('They played for a while', 'They talked and talked', 'They ran and laughed')}. Then"
            f" {a.name} walked on, but the song was gone from {a.his} head."
        ),
        f'"{capital(kept[0])} and {kept[1]} and ... what was the third thing?" {a.He} was {t.low}.',
        f"{a.name}"
        " "
        + t.pick(
            "sat down on a step and thought",
            "closed " + a.his + " eyes and thought",
            "walked in a circle and thought",
        )
        + ". "
        '"'
        + t.pick(
            "What would we do at home with it?",
            "I will say it from the start.",
            "I can see the kitchen in my head.",
        )
        + '"',
        (
            f'"{capital(things[lost])}!" {a.he} shouted, so loud that'
            f" {t.pick('a pigeon flew off', 'everybody looked', 'a dog barked')}."
        ),
        (
            f'{a.name} came home with {listed}. "You did not forget a thing," said the {t.elder}, and'
            f" {a.name} just smiled."
        ),
    ]


def mirror_pond(t: Tale) -> list[str]:
    """Somebody sees a reflection and misunderstands it."""
    a, b = t.hero, t.friend
    thing, where = t.rng.choice(
        [
            ("the moon", "the pond"),
            ("the star", "the well"),
            ("the moon", "a bucket of water"),
            ("the sun", "a puddle"),
        ]
    )
    return [
        (
            f"One {t.pick('clear', 'still', 'quiet')} night {a.name} looked into {where}, and there was {thing}!"
            if thing != "the sun"
            else f"After the rain {a.name} looked into {where}, and there was {thing}!"
        ),
        (
            f'"Oh no, {thing} fell into {where}!" cried {a.name}. "I must get it out before it gets'
            f' {t.pick("cold", "sick", "sleepy")}."'
        ),
        f"{a.He} took {article(t.pick('net', 'rope', 'spoon', 'long stick'))} and tried to catch {thing}.",
        (
            f"The water moved, and {thing} broke into {t.pick('a hundred', 'many', 'a thousand')} pieces."
            f' {a.name} was {t.low}. "Now I broke it!"'
        ),
        f'{b.name} heard {a.him} and came. "What are you doing?"',
        f'"{capital(thing)} is in {where}, and I broke it," said {a.name}.',
        (
            f"{b.name} did not laugh."
            f' "{t.pick("Wait a little", "Be still for a moment", "Count to ten with me")}," said {b.name}.'
            f" Soon the water was flat, and {thing} was whole again."
        ),
        (
            f'"Now look up," said {b.name}. {a.name} looked up, and there was {thing},'
            f" {t.pick('safe and bright', 'high in the sky', 'just where it always was')}."
        ),
        (
            f'"So there are two!" said {a.name}.'
            ' "'
            + t.pick(
                "One to look at and one to play with",
                "No, one, and its picture",
                "Only one, but the water likes it, too",
            )
            + ',"'
            f" said {b.name}, and they sat there for a long time."
        ),
    ]


def quarrel(t: Tale) -> list[str]:
    """Two friends quarrel about a game and make up."""
    a, b = t.hero, t.friend
    game = t.pick("tag", "cards", "hide and seek", "marbles", "chess", "a guessing game", "hopscotch")
    return [
        f"{a.name} and {b.name} played {game} at {t.place}.",
        (f'"I win!" said {a.name}. "No, you {t.pick("looked", "moved twice", "started too early")}!" said {b.name}.'),
        (
            '"I did not!" "You did!" They'
            f" {t.pick('shouted', 'got louder and louder', 'stamped their feet')}, and then each went home"
            " alone."
        ),
        (
            f"{a.name} sat {t.pick('on the stairs', 'by the window', 'on the bed')} with {a.his} {t.colour}"
            f" {t.toy}. It was no fun alone."
        ),
        f"{b.name} sat at home and ate some {t.food}. It did not taste good.",
        (
            f'{a.name} took a piece of paper and {t.pick("wrote", "painted")} on it: "I am sorry.'
            f' {t.pick("I did it.", "You are my best friend.", "Shall we play again?")}"'
        ),
        (
            f"{a.He} ran to the house of {b.name}. On the way {a.he} bumped into somebody. It was {b.name},"
            " with a piece of paper!"
        ),
        (
            'On the paper it said: "I am sorry, too." They looked at each other and'
            f" {t.pick('began to laugh', 'smiled', 'hugged')}."
        ),
        (
            f'"Who will start this time?" asked {a.name}.'
            f' "{t.pick("You", "We both", "The one who is not cross")}," said {b.name}.'
        ),
    ]


def too_much(t: Tale) -> list[str]:
    """Somebody wants too much of a good thing."""
    a, b = t.hero, t.friend
    return [
        (f'There was a plate of {t.food} on the table. "Take one each," said the {t.elder} of {a.name}, and went out.'),
        (
            f"{a.name} ate one. It was so {t.pick('sweet', 'good', 'soft')} that {a.he} ate another one, and"
            " another one."
        ),
        (f'"Stop," said {b.name}. "{t.pick("There will be none left", "That is not yours", "You will be sorry")}."'),
        (
            f"But {a.name} did not stop until the plate was empty. Soon {a.his} tummy began to"
            f" {t.pick('hurt', 'ache', 'grumble')}."
        ),
        f'"Ooh," said {a.name}. {a.He} lay down on the floor and felt {t.low}.',
        f'The {t.elder} came back and saw the empty plate. "Who ate all of it?"',
        f"{b.name} {t.pick('said nothing', 'looked at the ceiling', 'looked at the floor')}. "
        f'"I did," said {a.name} {t.pick("in a small voice", "and turned red", "at last")}. "{b.name} had'
        ' none."',
        (
            f'"Thank you for telling me," said the {t.elder}.'
            f' "{t.pick("Tomorrow we will make more", "When you feel better, you can help me bake")}, and'
            f' {b.name} will get the first one."'
        ),
        (f"The next day {a.name} {t.pick('stirred', 'mixed')} and baked, and {a.he} gave the biggest one to {b.name}."),
    ]


def treasure(t: Tale) -> list[str]:
    """A map leads from place to place to a surprise."""
    a, b = t.hero, t.friend
    prize = t.pick(
        f"{article(t.colour2)} {t.toy2}",
        f"a basket of {t.fruit}",
        "a box of old photographs",
        f"a cake and {NUMBERS[t.count]} candles",
        "a bag of seeds and a note",
        "a book with empty pages",
    )
    return [
        (
            f"In an old {t.pick('book', 'coat', 'box', 'drawer')}, {a.name} found a map. There was"
            f" {article(t.colour)} cross on it."
        ),
        (
            f'"{t.pick("A treasure!", "Somebody has hidden something!", "We must follow it!")}" said {a.name}'
            f" to {b.name}."
        ),
        f'The map said: "Start at {t.place}." So they went to {t.place}.',
        (f'"Now walk {t.rng.randrange(5, 50)} steps to {t.place2}," {b.name} read. They counted every step out loud.'),
        (
            '"Then look for the'
            f" {t.pick('flat stone', 'hollow tree', 'broken fence', 'blue door', 'tall sunflower')} near"
            f' {t.place3}," read {a.name}.'
        ),
        (
            f"They looked {t.pick('left and right', 'high and low', 'everywhere')}."
            f' {t.maybe(f"{b.name} was getting tired. ")}"Here!" cried {t.pick(a.name, b.name)}.'
        ),
        (
            f"They {t.pick('dug with their hands', 'lifted the lid', 'pulled away the leaves')}, and there it"
            f" was: {prize}!"
        ),
        (
            "Next to it was a note:"
            ' "'
            + t.pick(
                "Share this with the one who came with you.",
                "I hid this for you when I was small.",
                "Well done! Now hide it for somebody else.",
            )
            + '"'
            f" It was from the {t.elder} of {a.name}."
        ),
        (
            t.pick(
                "They did just what the note said",
                "They read the note three times",
                "They looked at each other and grinned",
            )
            + "."
        ),
    ]


def broken_toy(t: Tale) -> list[str]:
    """A broken thing is repaired with patience."""
    a, b = t.hero, t.friend
    return [
        (
            f"The {t.colour} {t.toy} of {a.name} was old. One day it"
            f" {t.pick('broke in two', 'had a crack', 'lost a piece')}."
        ),
        (
            f'"{t.pick("Throw it away", "You should get a new one", "It is only a thing")}," said'
            f" {t.other.name}. But {a.name} did not want a new one."
        ),
        (
            f"{a.He} carried it to {b.name}, who could mend"
            f" {t.pick('almost everything', 'clocks and chairs', 'any broken thing')}."
        ),
        (
            f'{b.name} turned the {t.toy} around. "Hmm. I need {t.pick("glue", "a nail", "strong thread")},'
            f' {t.pick("a bit of wood", "some wire", "a clean cloth")} and a lot of time."'
        ),
        f'"I have time," said {a.name}. "May I {t.pick("help", "watch", "hold the lamp")}?"',
        (
            f"They worked until {t.pick('noon', 'evening', 'the lamp burned low')}. {a.name}"
            f" {t.pick('held the pieces', 'passed the tools', 'swept the floor')} and asked a lot of"
            " questions."
        ),
        (
            f'At last {b.name} said, "Try it." The {t.toy} was whole again. One could see a thin line, but'
            f" {a.name} liked the line."
        ),
        (
            '"' + t.pick("Now it has a story", "It is even better than before", "The line is where we worked") + ',"'
            f" said {a.name}."
        ),
        (
            f"The next time something broke at home, {a.name} {t.pick('took a pot of glue', 'got the tools')}"
            ' and said, "Let me try."'
        ),
    ]


def snowed_in(t: Tale) -> list[str]:
    """Neighbours help each other through bad weather."""
    a, b = t.hero, t.friend
    return [
        (f"It snowed for {NUMBERS[t.count]} days. The snow was as high as the {t.pick('window', 'fence', 'door')}."),
        (
            f"{a.name} had {t.food} and a warm stove. Then {a.he} looked across the street. No smoke came out"
            f" of the chimney of {b.name}."
        ),
        f'"{b.name} must be cold," said {a.name}. {a.He} put on {a.his} {t.colour} coat and took a shovel.',
        (
            f"{a.He} dug and dug. The snow was {t.pick('heavy', 'deep', 'hard')}, and {a.his} hands were"
            f" {t.pick('cold', 'numb', 'red')}."
        ),
        (f"After {t.pick('an hour', 'two hours', 'a long time')} {a.he} reached the {t.colour2} door and knocked."),
        (
            f'"Who is out in this snow?" said {b.name} from inside. "It is me, {a.name}! I have brought wood'
            f' and {t.food}."'
        ),
        (
            f"Soon there was a fire. {b.name}"
            f" {t.pick('stopped shivering', 'sat close to it', 'got warm hands again')}, and they ate"
            f" {t.food} together."
        ),
        (
            f'"{t.pick("Why did you come?", "You dug all that way for me?", "How can I thank you?")}" asked'
            f" {b.name}."
            f' "{t.pick("Your chimney was sad", "That is what neighbours do", "Dinner is better with two")},"'
            f" said {a.name}."
        ),
        (
            f"When spring came, {b.name} planted {t.pick('roses', 'tulips', 'sunflowers')} along the path"
            f" that {a.name} had dug."
        ),
    ]


def contest(t: Tale) -> list[str]:
    """A contest is lost, and something else is won."""
    a, b = t.hero, t.friend
    what = t.pick("picture", "song", "cake", "sand castle", "pumpkin", "paper hat", "poem", "snowman")
    return [
        f"There was a contest at {t.place}: Who would make the best {what}?",
        (
            f"{a.name} worked on {a.his} {what} all week. It was {t.pick('big', 'fine', 'lovely')} and {a.he}"
            f" was {t.high}."
        ),
        (
            f"{b.name} made a {what}, too, but {b.his} {what} was small and"
            f" {t.pick('simple', 'plain', 'a bit crooked')}."
        ),
        (
            f"The judge looked at each {what} and wrote down numbers. {a.name} got {NUMBERS[t.count]} points."
            f" {b.name} got {NUMBERS[t.count + 1]} points."
        ),
        f"So {b.name} won the {t.colour} ribbon. {a.name} felt {t.low}. {a.He} wanted to go home at once.",
        (
            f"But then {a.he} looked closely at the {what} of {b.name}."
            " " + t.pick("It had something special", "It made everyone smile", "It was made with a lot of care") + "."
        ),
        (
            f'{a.name} went up to {b.name}. "Yours is very good.'
            f' {t.pick("How did you do it?", "I like it a lot.", "You earned it.")}"'
        ),
        (
            f'{b.name} smiled. "Thank you.'
            f" {t.pick('I learned it from my ' + t.elder, 'I can show you', 'Yours is good as well')}. Shall"
            ' we make one together next time?"'
        ),
        f"And they did. The next year two names were on the {t.colour} ribbon: {a.name} and {b.name}.",
    ]


def bridge(t: Tale) -> list[str]:
    """Neighbours on two sides of the water build a bridge."""
    a, b, c = t.hero, t.friend, t.other
    water = t.pick("stream", "brook", "river", "ditch")
    return [
        f"{a.name} lived on one side of a {water}, and {b.name} lived on the other side.",
        (
            f"They waved to each other every {t.pick('morning', 'evening', 'day')}, but the {water} was too"
            f" {t.pick('wide', 'deep', 'fast')} to cross."
        ),
        (
            f'"I wish I could {t.pick("show you my " + t.toy, "bring you some " + t.food, "play with you")},"'
            f" called {a.name}."
        ),
        (
            f'"Let us build a bridge!" called {b.name}. {a.name} brought {NUMBERS[t.count]}'
            f" {t.pick('boards', 'logs')}, and {b.name} brought a rope."
        ),
        (
            f"The first bridge {t.pick('was too short', 'fell into the water', 'broke in the middle')}."
            f" Splash! {t.maybe('Both of them got wet. ')}They were {t.low}."
        ),
        (
            f"{c.name}, an old {c.kind}, watched them."
            ' "'
            + t.pick("Put a big stone in the middle", "Start from both sides and meet", "Tie the ends to the trees")
            + ',"'
            f" said {c.name}."
        ),
        (
            f"They tried it. {a.name} worked from one side and {b.name} from the other side, until they met"
            " in the middle."
        ),
        (
            f'"{t.pick("Hello, neighbour", "Nice to meet you up close", "You are taller than I thought")}!"'
            f" said {b.name}, and {a.name} laughed."
        ),
        (
            f"From then on they met on the bridge each {t.pick('Sunday', 'afternoon', 'evening')}, and"
            f" {c.name} often came for {t.food2}."
        ),
    ]


def new_place(t: Tale) -> list[str]:
    """Somebody is new and finds a way to belong."""
    a, b = t.hero, t.friend
    hobby = t.pick(
        "collect stones",
        "draw maps",
        "fold paper birds",
        "play the flute",
        "look at stars",
        "tell jokes",
        "feed the ducks",
    )
    return [
        f"{a.name} had just moved to a house near {t.place}. Nobody knew {a.his} name yet.",
        f"At school everyone had a friend to sit with. {a.name} sat alone with {a.his} {t.colour} {t.toy}.",
        (
            '"' + t.pick("I want to go back to our old house", "Nobody talks to me", "They all know each other") + ',"'
            f" {a.he} told {a.his} {t.elder}."
        ),
        (
            f'"Do what you like to do," said the {t.elder}, "and somebody will like it, too." What {a.name}'
            f" liked was to {hobby}."
        ),
        (f"So the next day {a.name} began to {hobby} {t.pick('in the break', 'after lunch', 'under the big tree')}."),
        (
            f"At first nobody came. Then {b.name} stopped."
            f' "{t.pick("What is that?", "May I see?", "Can you show me how?")}" asked {b.name}.'
        ),
        (
            f"{a.name} showed {b.him}. It was hard to explain, but {b.name}"
            f" {t.pick('asked good questions', 'learned fast', 'did not mind')}."
        ),
        (
            f"On the next day {b.name} brought {t.other.name}. On the day after that there were"
            f" {NUMBERS[t.count]} of them."
        ),
        (
            f'"{t.pick("What is your name?", "What do they call you?")}" asked {t.other.name}.'
            f' "{a.name}," said {a.name}, and this time everybody remembered it.'
        ),
    ]


def sharing_count(t: Tale) -> list[str]:
    """Fruit is counted and shared out fairly."""
    a, b, c = t.hero, t.friend, t.other
    each = t.rng.randrange(2, 5)
    total = each * 3
    return [
        (
            f"{a.name} picked {NUMBERS[total]} {t.fruit} at {t.place} and put them in {article(t.colour)}"
            f" {t.pick('bag', 'bucket', 'basket')}."
        ),
        (
            f"On the way home {a.he} met {b.name} and {c.name}. They"
            f" {t.pick('had worked all day', 'had no lunch', 'looked hungry')}."
        ),
        (f'"How many {t.fruit} do you have?" asked {b.name}. {a.name} counted them. "{capital(NUMBERS[total])}!"'),
        (
            f'"I found them, so they are all mine," thought {a.name}. But'
            " "
            + t.pick(
                "it did not feel right",
                a.he + " saw how tired they were",
                "then " + a.he + " had a better idea",
            )
            + "."
        ),
        f'"There are three of us," said {a.name}. "One for you, one for you, one for me."',
        (f"{a.He} went around {NUMBERS[each]} times, until the {t.pick('last one', 'very last one')} was gone."),
        (
            f"Now {a.name} had {NUMBERS[each]} {t.fruit}, {b.name} had {NUMBERS[each]} {t.fruit}, and"
            f" {c.name} had {NUMBERS[each]} {t.fruit}, too."
        ),
        (
            f'"{capital(NUMBERS[each])} and {NUMBERS[each]} and {NUMBERS[each]} make {NUMBERS[total]}," said'
            f" {c.name}."
            f' "{t.pick("That is fair", "You are good at sharing", "Nobody has more than the others")}."'
        ),
        (
            f"They sat down {t.pick('in the grass', 'on a log', 'in the shade')} and ate."
            f" {t.pick('', f'The {t.fruit} were sweet. ', f'The {t.fruit} were ripe and juicy. ')}{a.name}"
            f" felt {t.high}."
        ),
    ]


PLOTS: tuple[Callable[[Tale], list[str]], ...] = (
    kite_in_tree,
    foggy_night,
    strange_noise,
    wrong_letter,
    practice,
    picnic,
    nest,
    errand,
    mirror_pond,
    quarrel,
    too_much,
    treasure,
    broken_toy,
    snowed_in,
    contest,
    bridge,
    new_place,
    sharing_count,
)


def opening(t: Tale) -> str:
    """Return one or two sentences that introduce the hero."""
    a = t.hero
    kind = a.kind
    introduced = t.pick(
        f"{a.name} was {article(t.trait)} {kind}.",
        f"There once was {article(t.trait)} {kind} whose name was {a.name}.",
        f"This is the story of {a.name}, {article(t.trait)} {kind}.",
        f"In a {t.pick('village', 'small town', 'house')} by {t.place} lived {article(kind)} who was called {a.name}.",
        f"Everybody at {t.place} knew {a.name}, the {t.trait} {kind}.",
        f"{a.name} the {kind} was {t.trait}.",
    )
    scene = t.pick(
        f"It was {article(t.weather)} {t.time}.",
        f"One {t.weather} {t.time} {a.name} {t.pick('was up early', 'had nothing to do', 'felt ' + t.high)}.",
        f"{a.He} liked {t.pick('the colour ' + t.colour, t.food, 'to sing', 'long walks', 'the rain', 'old books')}.",
        "",
        "",
    )
    return f"{introduced} {scene}".strip()


def ending(t: Tale) -> str:
    """Return a closing sentence, a moral or nothing."""
    a, b = t.hero, t.friend
    return t.pick(
        f"{a.name} went to bed {t.high} that night.",
        f"And {a.name} and {b.name} were friends from that day on.",
        "It was a day to remember.",
        f"{t.pick('In the evening', 'Later')}, {a.name} told {a.his} {t.elder} all about it.",
        f"{a.name} learned that"
        " "
        + t.pick(
            "a friend makes hard things easy",
            "it helps to ask",
            "kindness comes back",
            "it pays to be patient",
            "small steps go far",
            "telling the truth feels good",
        )
        + ".",
        f"{a.name} felt {t.high}, and {b.name} was {t.high2}, too.",
        "The end.",
        "",
    )


def story(rng: random.Random, animal: str | None = None) -> str:
    """Tell one story of about 120 to 250 words in two to five paragraphs.

    With ``animal`` (for example ``"owl"``) the hero is that animal.
    """
    tale = Tale(rng, animal)
    sentences = [opening(tale), *rng.choice(PLOTS)(tale), ending(tale)]
    paragraphs = [sentences[0]]
    for sentence in sentences[1:]:
        if not sentence:
            continue
        if rng.random() < 0.28 and len(paragraphs[-1]) > 120:
            paragraphs.append(sentence)
        else:
            paragraphs[-1] += " " + sentence
    return re.sub(r"  +", " ", "\n\n".join(paragraphs))
