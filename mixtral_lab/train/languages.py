"""The same small tales in English, French, German and Spanish, sentence by sentence.

``tale`` draws the same choices from the same random state in every language, so equal seeds give
translations. Every sentence is a row of variants, and every variant holds one text per language in the order
of ``LANGUAGES``. Slots in braces are filled from the tables below; ``{h:er|sie}`` chooses by the gender of
the hero and ``{f:..|..}`` by that of the friend, masculine first.
"""

import random
import re
from typing import NamedTuple

from mixtral_lab.train.stories import article, words

LANGUAGES = ("english", "french", "german", "spanish")

GIRLS = words("Anna Clara Emma Julia Laura Marta Nora Sofia Eva Lina Irene Paula Elena Carla Rosa Olivia Alicia Vera")
BOYS = words(
    "David Daniel Martin Simon Leon Samuel Adrian Lucas Oscar Victor Hugo Bruno Felix Gabriel Max Noah Paul Leo"
)


class Thing(NamedTuple):
    """A noun with its forms: ``the`` and ``a`` as object of a verb, ``subject`` of a sentence, ``my``."""

    the: str
    a: str
    subject: str
    my: str


# English noun | gender and noun in French | in German | in Spanish.
NOUNS = words(
    "ball|m ballon|m Ball|f pelota;key|f clé|m Schlüssel|f llave;book|m livre|n Buch|m libro;"
    "lamp|f lampe|f Lampe|f lámpara;hat|m chapeau|m Hut|m sombrero;box|f boîte|f Kiste|f caja;"
    "cup|f tasse|f Tasse|f taza;kite|m cerf-volant|m Drachen|f cometa;"
    "basket|m panier|m Korb|f cesta;map|f carte|f Karte|m mapa;bell|f cloche|f Glocke|f campana;"
    "boat|m bateau|n Boot|m barco;doll|f poupée|f Puppe|f muñeca;drum|m tambour|f Trommel|m tambor;"
    "letter|f lettre|m Brief|f carta;clock|f horloge|f Uhr|m reloj;coat|m manteau|m Mantel|m abrigo;"
    "spoon|f cuillère|m Löffel|f cuchara;flute|f flûte|f Flöte|f flauta;bag|m sac|f Tasche|f bolsa;"
    "chair|f chaise|m Stuhl|f silla;shoe|f chaussure|m Schuh|m zapato;"
    "picture|f image|n Bild|m cuadro;ring|f bague|m Ring|m anillo;"
    "bottle|f bouteille|f Flasche|f botella;stone|f pierre|m Stein|f piedra;"
    "bike|m vélo|n Fahrrad|f bicicleta",
    ";",
)


def forms(row: str) -> tuple[Thing, Thing, Thing, Thing]:
    """Build the forms of a noun in the four languages from its row in ``NOUNS``."""
    english, french, german, spanish = row.split("|")
    (fg, fn), (gg, gn), (sg, sn) = (text.split(" ", 1) for text in (french, german, spanish))
    elided = fn[0] in "aeiouhé"
    le = f"l'{fn}" if elided else f"{'le' if fg == 'm' else 'la'} {fn}"
    den, einen, der, mein = {
        "m": ("den", "einen", "der", "mein"),
        "f": ("die", "eine", "die", "meine"),
        "n": ("das", "ein", "das", "mein"),
    }[gg]
    el = f"{'el' if sg == 'm' else 'la'} {sn}"
    return (
        Thing(f"the {english}", article(english), f"the {english}", f"my {english}"),
        Thing(le, f"{'un' if fg == 'm' else 'une'} {fn}", le, f"{'mon' if fg == 'm' or elided else 'ma'} {fn}"),
        Thing(f"{den} {gn}", f"{einen} {gn}", f"{der} {gn}", f"{mein} {gn}"),
        Thing(el, f"{'un' if sg == 'm' else 'una'} {sn}", el, f"mi {sn}"),
    )


THINGS = [forms(row) for row in NOUNS]
# Where something happens, and the same place as a goal: "in the garden", "to the garden".
PLACES = [
    (
        ("in the garden", "dans le jardin", "im Garten", "en el jardín"),
        ("to the garden", "dans le jardin", "in den Garten", "al jardín"),
    ),
    (
        ("at the market", "au marché", "auf dem Markt", "en el mercado"),
        ("to the market", "au marché", "auf den Markt", "al mercado"),
    ),
    (
        ("in the forest", "dans la forêt", "im Wald", "en el bosque"),
        ("to the forest", "dans la forêt", "in den Wald", "al bosque"),
    ),
    (
        ("at school", "à l'école", "in der Schule", "en la escuela"),
        ("to school", "à l'école", "in die Schule", "a la escuela"),
    ),
    (
        ("at the station", "à la gare", "am Bahnhof", "en la estación"),
        ("to the station", "à la gare", "zum Bahnhof", "a la estación"),
    ),
    (
        ("by the river", "au bord de la rivière", "am Fluss", "junto al río"),
        ("to the river", "à la rivière", "zum Fluss", "al río"),
    ),
    (
        ("in the kitchen", "dans la cuisine", "in der Küche", "en la cocina"),
        ("to the kitchen", "dans la cuisine", "in die Küche", "a la cocina"),
    ),
    (
        ("on the beach", "sur la plage", "am Strand", "en la playa"),
        ("to the beach", "à la plage", "an den Strand", "a la playa"),
    ),
    (
        ("in the village", "dans le village", "im Dorf", "en el pueblo"),
        ("to the village", "au village", "ins Dorf", "al pueblo"),
    ),
    (
        ("in the library", "à la bibliothèque", "in der Bibliothek", "en la biblioteca"),
        ("to the library", "à la bibliothèque", "in die Bibliothek", "a la biblioteca"),
    ),
    (
        ("in the park", "dans le parc", "im Park", "en el parque"),
        ("to the park", "au parc", "in den Park", "al parque"),
    ),
    (
        ("on the bridge", "sur le pont", "auf der Brücke", "en el puente"),
        ("to the bridge", "au pont", "zur Brücke", "al puente"),
    ),
]
HIDDEN = [
    ("under the table", "sous la table", "unter dem Tisch", "debajo de la mesa"),
    ("behind the door", "derrière la porte", "hinter der Tür", "detrás de la puerta"),
    ("next to the tree", "à côté de l'arbre", "neben dem Baum", "al lado del árbol"),
    ("under the bed", "sous le lit", "unter dem Bett", "debajo de la cama"),
    ("in the grass", "dans l'herbe", "im Gras", "en la hierba"),
    ("behind the house", "derrière la maison", "hinter dem Haus", "detrás de la casa"),
    ("between two stones", "entre deux pierres", "zwischen zwei Steinen", "entre dos piedras"),
]
FOODS = [
    ("bread", "du pain", "Brot", "pan"),
    ("soup", "de la soupe", "Suppe", "sopa"),
    ("cheese", "du fromage", "Käse", "queso"),
    ("cake", "du gâteau", "Kuchen", "pastel"),
    ("fish", "du poisson", "Fisch", "pescado"),
    ("rice", "du riz", "Reis", "arroz"),
    ("apples", "des pommes", "Äpfel", "manzanas"),
    ("eggs", "des œufs", "Eier", "huevos"),
    ("honey", "du miel", "Honig", "miel"),
    ("salad", "de la salade", "Salat", "ensalada"),
    ("milk", "du lait", "Milch", "leche"),
    ("nuts", "des noix", "Nüsse", "nueces"),
]
NUMBERS = [
    ("two", "deux", "zwei", "dos"),
    ("three", "trois", "drei", "tres"),
    ("four", "quatre", "vier", "cuatro"),
    ("five", "cinq", "fünf", "cinco"),
    ("six", "six", "sechs", "seis"),
    ("seven", "sept", "sieben", "siete"),
    ("eight", "huit", "acht", "ocho"),
    ("ten", "dix", "zehn", "diez"),
]
WEATHER = [
    ("It was raining.", "Il pleuvait.", "Es regnete.", "Llovía."),
    ("The sun was shining.", "Le soleil brillait.", "Die Sonne schien.", "Brillaba el sol."),
    ("It was snowing.", "Il neigeait.", "Es schneite.", "Nevaba."),
    ("It was very cold.", "Il faisait très froid.", "Es war sehr kalt.", "Hacía mucho frío."),
    ("It was a warm day.", "C'était une journée chaude.", "Es war ein warmer Tag.", "Era un día cálido."),
    ("The wind was blowing.", "Le vent soufflait.", "Der Wind wehte.", "Soplaba el viento."),
]
DAYS = [
    ("On Monday", "Lundi", "Am Montag", "El lunes"),
    ("On Tuesday", "Mardi", "Am Dienstag", "El martes"),
    ("On Wednesday", "Mercredi", "Am Mittwoch", "El miércoles"),
    ("On Thursday", "Jeudi", "Am Donnerstag", "El jueves"),
    ("On Friday", "Vendredi", "Am Freitag", "El viernes"),
    ("On Saturday", "Samedi", "Am Samstag", "El sábado"),
    ("On Sunday", "Dimanche", "Am Sonntag", "El domingo"),
]
# What people do on a day of the week; German puts the verb before the name.
DEEDS = [
    (
        "{day}, {hero} went {to}.",
        "{day}, {hero} est {h:allé|allée} {to}.",
        "{day} ging {hero} {to}.",
        "{day}, {hero} fue {to}.",
    ),
    (
        "{day}, {hero} read a long book.",
        "{day}, {hero} a lu un long livre.",
        "{day} las {hero} ein langes Buch.",
        "{day}, {hero} leyó un libro largo.",
    ),
    (
        "{day}, {hero} cooked with {friend}.",
        "{day}, {hero} a cuisiné avec {friend}.",
        "{day} kochte {hero} mit {friend}.",
        "{day}, {hero} cocinó con {friend}.",
    ),
    (
        "{day}, {hero} found {a_thing} {hidden}.",
        "{day}, {hero} a trouvé {a_thing} {hidden}.",
        "{day} fand {hero} {a_thing} {hidden}.",
        "{day}, {hero} encontró {a_thing} {hidden}.",
    ),
    (
        "{day}, {hero} bought {a_thing2}.",
        "{day}, {hero} a acheté {a_thing2}.",
        "{day} kaufte {hero} {a_thing2}.",
        "{day}, {hero} compró {a_thing2}.",
    ),
    (
        "{day}, {hero} ate {food} with {friend}.",
        "{day}, {hero} a mangé {food} avec {friend}.",
        "{day} aß {hero} {food} mit {friend}.",
        "{day}, {hero} comió {food} con {friend}.",
    ),
    (
        "{day}, {hero} slept until noon.",
        "{day}, {hero} a dormi jusqu'à midi.",
        "{day} schlief {hero} bis zum Mittag.",
        "{day}, {hero} durmió hasta el mediodía.",
    ),
    (
        "{day}, {hero} wrote a letter to {friend}.",
        "{day}, {hero} a écrit une lettre à {friend}.",
        "{day} schrieb {hero} einen Brief an {friend}.",
        "{day}, {hero} escribió una carta a {friend}.",
    ),
    (
        "{day}, {hero} sang a song {in}.",
        "{day}, {hero} a chanté une chanson {in}.",
        "{day} sang {hero} ein Lied {in}.",
        "{day}, {hero} cantó una canción {in}.",
    ),
    (
        "{day}, {hero} worked for {number} hours.",
        "{day}, {hero} a travaillé pendant {number} heures.",
        "{day} arbeitete {hero} {number} Stunden lang.",
        "{day}, {hero} trabajó durante {number} horas.",
    ),
    (
        "{day}, {hero} visited {friend} {in2}.",
        "{day}, {hero} a retrouvé {friend} {in2}.",
        "{day} traf {hero} {friend} {in2}.",
        "{day}, {hero} vio a {friend} {in2}.",
    ),
    (
        "{day}, {hero} learned {number} new words.",
        "{day}, {hero} a appris {number} nouveaux mots.",
        "{day} lernte {hero} {number} neue Wörter.",
        "{day}, {hero} aprendió {number} palabras nuevas.",
    ),
    (
        "{day}, {hero} stayed at home.",
        "{day}, {hero} est {h:resté|restée} à la maison.",
        "{day} blieb {hero} zu Hause.",
        "{day}, {hero} se quedó en casa.",
    ),
    (
        "{day}, {hero} counted the stars.",
        "{day}, {hero} a compté les étoiles.",
        "{day} zählte {hero} die Sterne.",
        "{day}, {hero} contó las estrellas.",
    ),
]

OPENINGS = [
    (
        "{hero} lived near {friend}.",
        "{hero} habitait près de chez {friend}.",
        "{hero} wohnte in der Nähe von {friend}.",
        "{hero} vivía cerca de {friend}.",
    ),
    (
        "{hero} and {friend} were good friends.",
        "{hero} et {friend} s'aimaient beaucoup.",
        "{hero} und {friend} mochten sich sehr.",
        "{hero} y {friend} se querían mucho.",
    ),
    (
        "This is a story about {hero}.",
        "Voici une histoire sur {hero}.",
        "Dies ist eine Geschichte über {hero}.",
        "Esta es una historia sobre {hero}.",
    ),
    (
        "One morning {hero} woke up early.",
        "Un matin, {hero} s'est {h:levé|levée} tôt.",
        "Eines Morgens wachte {hero} früh auf.",
        "Una mañana {hero} se despertó temprano.",
    ),
]
ENDINGS = [
    ("It was a good day.", "C'était une bonne journée.", "Es war ein guter Tag.", "Fue un buen día."),
    (
        "In the evening {hero} was tired and happy.",
        "Le soir, {hero} était {h:fatigué et heureux|fatiguée et heureuse}.",
        "Am Abend war {hero} müde und glücklich.",
        "Por la noche {hero} estaba {h:cansado y contento|cansada y contenta}.",
    ),
    (
        "{hero} and {friend} laughed for a long time.",
        "{hero} et {friend} ont ri longtemps.",
        "{hero} und {friend} lachten lange.",
        "{hero} y {friend} se rieron mucho tiempo.",
    ),
    (
        "Then {hero} went to sleep.",
        "Puis {hero} est {h:allé|allée} dormir.",
        "Dann ging {hero} schlafen.",
        "Después {hero} se fue a dormir.",
    ),
    (
        "They never forgot that day.",
        "Ils n'ont jamais oublié ce jour.",
        "Sie vergaßen diesen Tag nie.",
        "Nunca olvidaron aquel día.",
    ),
]
Row = list[tuple[str, str, str, str]]
LOST: list[Row] = [
    [
        (
            "{hero} had {a_thing}.",
            "{hero} avait {a_thing}.",
            "{hero} hatte {a_thing}.",
            "{hero} tenía {a_thing}.",
        ),
        (
            "{hero} got {a_thing} from {friend}.",
            "{hero} a reçu {a_thing} de {friend}.",
            "{hero} bekam {a_thing} von {friend}.",
            "{hero} recibió {a_thing} de {friend}.",
        ),
    ],
    [
        (
            "One day {hero} went {to}.",
            "Un jour, {hero} est {h:allé|allée} {to}.",
            "Eines Tages ging {hero} {to}.",
            "Un día {hero} fue {to}.",
        )
    ],
    [
        (
            "When {h:he|she} came home, {the_subject} was gone.",
            "Quand {h:il est rentré|elle est rentrée} à la maison, {the_subject} n'était plus là.",
            "Als {h:er|sie} nach Hause kam, war {the_subject} weg.",
            "Cuando volvió a casa, {the_subject} ya no estaba.",
        )
    ],
    [
        (
            '"Where is {my_thing}?" asked {hero}.',
            "« Où est {my_thing} ? » a demandé {hero}.",
            "„Wo ist {my_thing}?“, fragte {hero}.",
            "«¿Dónde está {my_thing}?», preguntó {hero}.",
        ),
        (
            '"I cannot find {my_thing}," said {hero}.',
            "« Je ne trouve pas {my_thing} », a dit {hero}.",
            "„{my_thing} ist nicht da“, sagte {hero}.",
            "«No encuentro {my_thing}», dijo {hero}.",
        ),
    ],
    [
        (
            '"I will help you," said {friend}.',
            "« Je vais t'aider », a dit {friend}.",
            "„Ich helfe dir“, sagte {friend}.",
            "«Yo te ayudo», dijo {friend}.",
        ),
        (
            '"Let us look together," said {friend}.',
            "« Cherchons ensemble », a dit {friend}.",
            "„Suchen wir zusammen“, sagte {friend}.",
            "«Busquemos juntos», dijo {friend}.",
        ),
    ],
    [
        (
            "They looked everywhere {in} for {number} hours.",
            "Ils ont cherché partout {in} pendant {number} heures.",
            "Sie suchten {in} {number} Stunden lang überall.",
            "Buscaron por todas partes {in} durante {number} horas.",
        )
    ],
    [
        (
            "At last {friend} found {the_thing} {hidden}.",
            "Enfin, {friend} a trouvé {the_thing} {hidden}.",
            "Endlich fand {friend} {the_thing} {hidden}.",
            "Por fin {friend} encontró {the_thing} {hidden}.",
        )
    ],
    [
        (
            '"Thank you!" said {hero}.',
            "« Merci ! » a dit {hero}.",
            "„Danke!“, sagte {hero}.",
            "«¡Gracias!», dijo {hero}.",
        )
    ],
]
MEAL: list[Row] = [
    [
        (
            "{hero} was hungry and had only {food}.",
            "{hero} avait faim et n'avait que {food}.",
            "{hero} hatte Hunger und hatte nur {food}.",
            "{hero} tenía hambre y solo tenía {food}.",
        )
    ],
    [
        (
            "{friend} had {food2}.",
            "{friend} avait {food2}.",
            "{friend} hatte {food2}.",
            "{friend} tenía {food2}.",
        )
    ],
    [
        (
            '"Would you like to eat with me?" asked {friend}.',
            "« Veux-tu manger avec moi ? » a demandé {friend}.",
            "„Willst du mit mir essen?“, fragte {friend}.",
            "«¿Quieres comer conmigo?», preguntó {friend}.",
        )
    ],
    [
        (
            '"Yes, with pleasure," said {hero}.',
            "« Oui, avec plaisir », a dit {hero}.",
            "„Ja, gern“, sagte {hero}.",
            "«Sí, con mucho gusto», dijo {hero}.",
        ),
        (
            '"Yes, I will bring {food}," said {hero}.',
            "« Oui, j'apporte {food} », a dit {hero}.",
            "„Ja, ich bringe {food} mit“, sagte {hero}.",
            "«Sí, yo traigo {food}», dijo {hero}.",
        ),
    ],
    [("They met {in}.", "Ils se sont retrouvés {in}.", "Sie trafen sich {in}.", "Se encontraron {in}.")],
    [
        (
            "{hero} put {food} on the table, and {friend} brought {food2}.",
            "{hero} a mis {food} sur la table, et {friend} a apporté {food2}.",
            "{hero} legte {food} auf den Tisch, und {friend} brachte {food2}.",
            "{hero} puso {food} en la mesa y {friend} trajo {food2}.",
        )
    ],
    [
        (
            "They talked for {number} hours.",
            "Ils ont parlé pendant {number} heures.",
            "Sie redeten {number} Stunden lang.",
            "Hablaron durante {number} horas.",
        )
    ],
    [
        (
            '"It tastes better with a friend," said {hero}.',
            "« C'est meilleur à deux », a dit {hero}.",
            "„Zu zweit schmeckt es besser“, sagte {hero}.",
            "«Entre dos sabe mejor», dijo {hero}.",
        )
    ],
]
JOURNEY: list[Row] = [
    [
        (
            "{hero} wanted to travel far away.",
            "{hero} voulait partir très loin.",
            "{hero} wollte weit weg reisen.",
            "{hero} quería viajar muy lejos.",
        )
    ],
    [
        (
            "{h:He|She} took {a_thing} and {food}.",
            "{h:Il|Elle} a pris {a_thing} et {food}.",
            "{h:Er|Sie} nahm {a_thing} und {food}.",
            "Tomó {a_thing} y {food}.",
        )
    ],
    [
        (
            "First {h:he|she} went {to}.",
            "D'abord, {h:il est allé|elle est allée} {to}.",
            "Zuerst ging {h:er|sie} {to}.",
            "Primero fue {to}.",
        )
    ],
    [
        (
            "After {number} days {h:he|she} came {to2}.",
            "Après {number} jours, {h:il est arrivé|elle est arrivée} {in2}.",
            "Nach {number} Tagen kam {h:er|sie} {to2}.",
            "Después de {number} días llegó {to2}.",
        )
    ],
    [
        (
            "There {h:he|she} met {friend}.",
            "Là, {h:il|elle} a rencontré {friend}.",
            "Dort traf {h:er|sie} {friend}.",
            "Allí encontró a {friend}.",
        )
    ],
    [
        (
            '"Where are you going?" asked {friend}.',
            "« Où vas-tu ? » a demandé {friend}.",
            "„Wohin gehst du?“, fragte {friend}.",
            "«¿Adónde vas?», preguntó {friend}.",
        ),
        (
            '"Where do you come from?" asked {friend}.',
            "« D'où viens-tu ? » a demandé {friend}.",
            "„Woher kommst du?“, fragte {friend}.",
            "«¿De dónde vienes?», preguntó {friend}.",
        ),
    ],
    [
        (
            '"I do not know yet," said {hero}.',
            "« Je ne sais pas encore », a dit {hero}.",
            "„Das weiß ich noch nicht“, sagte {hero}.",
            "«Todavía no lo sé», dijo {hero}.",
        )
    ],
    [
        (
            '"Then stay here and eat {food2} with us," said {friend}.',
            "« Alors reste ici et mange {food2} avec nous », a dit {friend}.",
            "„Dann bleib hier und iss {food2} mit uns“, sagte {friend}.",
            "«Entonces quédate aquí y come {food2} con nosotros», dijo {friend}.",
        )
    ],
    [
        (
            "{hero} stayed for {number2} years.",
            "{hero} est {h:resté|restée} {number2} ans.",
            "{hero} blieb {number2} Jahre.",
            "{hero} se quedó {number2} años.",
        )
    ],
]
MENDING: list[Row] = [
    [
        (
            "{the_subject} of {hero} was broken.",
            "{the_subject} de {hero} ne marchait plus.",
            "{the_subject} von {hero} war kaputt.",
            "{the_subject} de {hero} ya no servía.",
        )
    ],
    [
        (
            '"I need help," said {hero}.',
            "« J'ai besoin d'aide », a dit {hero}.",
            "„Ich brauche Hilfe“, sagte {hero}.",
            "«Necesito ayuda», dijo {hero}.",
        ),
        (
            '"What shall I do?" asked {hero}.',
            "« Que dois-je faire ? » a demandé {hero}.",
            "„Was soll ich tun?“, fragte {hero}.",
            "«¿Qué debo hacer?», preguntó {hero}.",
        ),
    ],
    [
        (
            "{friend} looked at {the_thing} for a long time.",
            "{friend} a regardé {the_thing} longtemps.",
            "{friend} sah {the_thing} lange an.",
            "{friend} miró {the_thing} durante mucho tiempo.",
        )
    ],
    [
        (
            '"It is not easy, but we will try," said {friend}.',
            "« Ce n'est pas facile, mais nous allons essayer », a dit {friend}.",
            "„Es ist nicht leicht, aber wir versuchen es“, sagte {friend}.",
            "«No es fácil, pero lo intentaremos», dijo {friend}.",
        )
    ],
    [
        (
            "They worked {in} until the evening.",
            "Ils ont travaillé {in} jusqu'au soir.",
            "Sie arbeiteten {in} bis zum Abend.",
            "Trabajaron {in} hasta la noche.",
        ),
        (
            "They worked for {number} days.",
            "Ils ont travaillé pendant {number} jours.",
            "Sie arbeiteten {number} Tage lang.",
            "Trabajaron durante {number} días.",
        ),
    ],
    [
        (
            "The first time it did not work.",
            "La première fois, cela n'a pas marché.",
            "Beim ersten Mal ging es nicht.",
            "La primera vez no funcionó.",
        )
    ],
    [
        (
            "The second time everything was good.",
            "La deuxième fois, tout allait bien.",
            "Beim zweiten Mal war alles gut.",
            "La segunda vez todo salió bien.",
        )
    ],
    [
        (
            "{hero} gave {friend} {food} to say thank you.",
            "Pour dire merci, {hero} a donné {food} à {friend}.",
            "Zum Dank gab {hero} {friend} {food}.",
            "Para dar las gracias, {hero} le dio {food} a {friend}.",
        )
    ],
]
STRANGER: list[Row] = [
    [
        (
            "{hero} was sitting alone {in}.",
            "{hero} était {h:assis seul|assise seule} {in}.",
            "{hero} saß allein {in}.",
            "{hero} estaba {h:sentado solo|sentada sola} {in}.",
        )
    ],
    [
        (
            "Nobody knew {h:him|her}.",
            "Personne ne {h:le|la} connaissait.",
            "Niemand kannte {h:ihn|sie}.",
            "Nadie {h:lo|la} conocía.",
        )
    ],
    [
        (
            "Then {friend} came with {a_thing}.",
            "Alors {friend} est {f:venu|venue} avec {a_thing}.",
            "Da kam {friend} und brachte {a_thing}.",
            "Entonces vino {friend} con {a_thing}.",
        )
    ],
    [
        (
            '"What is your name?" asked {friend}.',
            "« Comment t'appelles-tu ? » a demandé {friend}.",
            "„Wie heißt du?“, fragte {friend}.",
            "«¿Cómo te llamas?», preguntó {friend}.",
        )
    ],
    [
        (
            '"My name is {hero}," was the answer.',
            "« Je m'appelle {hero} », a été la réponse.",
            "„Ich heiße {hero}“, war die Antwort.",
            "«Me llamo {hero}», fue la respuesta.",
        )
    ],
    [
        (
            '"How old are you?" asked {friend}. "I am {number2} years old," said {hero}.',
            "« Quel âge as-tu ? » a demandé {friend}. « J'ai {number2} ans », a dit {hero}.",
            "„Wie alt bist du?“, fragte {friend}. „Ich bin {number2} Jahre alt“, sagte {hero}.",
            "«¿Cuántos años tienes?», preguntó {friend}. «Tengo {number2} años», dijo {hero}.",
        )
    ],
    [
        (
            "{friend} showed {hero} {the_thing}, and they played {in2}.",
            "{friend} a montré {the_thing} à {hero}, et ils ont joué {in2}.",
            "{friend} zeigte {hero} {the_thing}, und sie spielten {in2}.",
            "{friend} le enseñó {the_thing} a {hero}, y jugaron {in2}.",
        ),
        (
            "They went {to2} together.",
            "Ils sont allés ensemble {to2}.",
            "Sie gingen zusammen {to2}.",
            "Fueron juntos {to2}.",
        ),
    ],
    [
        (
            "From that day on {hero} was not alone.",
            "À partir de ce jour, {hero} n'était plus {h:seul|seule}.",
            "Von diesem Tag an war {hero} nicht mehr allein.",
            "Desde aquel día {hero} ya no estaba {h:solo|sola}.",
        )
    ],
]
PLOTS = (LOST, MEAL, JOURNEY, MENDING, STRANGER)


def tale(rng: random.Random, language: str) -> str:
    """Tell one tale of 60 to 120 words; the same random state gives the same tale in every language.

    Raises ValueError for a language that is not in ``LANGUAGES``.
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}: choose one of {', '.join(LANGUAGES)}")
    column = LANGUAGES.index(language)
    genders = [rng.random() < 0.5 for _ in "hf"]  # True: feminine
    # Two friends are never both women, so that "ils" and "nosotros" are right for the pair.
    if all(genders):
        genders[rng.randrange(2)] = False
    hero = rng.choice(GIRLS if genders[0] else BOYS)
    friend = rng.choice([name for name in (GIRLS if genders[1] else BOYS) if name != hero])
    thing, thing2 = rng.sample(THINGS, 2)
    place, place2 = rng.sample(PLACES, 2)
    food, food2 = rng.sample(FOODS, 2)
    number, number2 = rng.sample(NUMBERS, 2)
    slots = {
        "hero": hero,
        "friend": friend,
        "the_thing": thing[column].the,
        "a_thing": thing[column].a,
        "the_subject": thing[column].subject,
        "my_thing": thing[column].my,
        "a_thing2": thing2[column].a,
        "in": place[0][column],
        "to": place[1][column],
        "in2": place2[0][column],
        "to2": place2[1][column],
        "food": food[column],
        "food2": food2[column],
        "number": number[column],
        "number2": number2[column],
        "hidden": rng.choice(HIDDEN)[column],
    }
    rows: list[tuple[str, dict[str, str]]] = [(rng.choice(OPENINGS)[column], {})]
    if rng.random() < 0.6:
        rows.append((rng.choice(WEATHER)[column], {}))
    if rng.random() < 0.25:
        first = rng.randrange(3)
        days = DAYS[first : first + rng.randrange(4, 6)]
        rows += [
            (deed[column], {"day": day[column]}) for day, deed in zip(days, rng.sample(DEEDS, len(days)), strict=True)
        ]
    else:
        rows += [(rng.choice(row)[column], {}) for row in rng.choice(PLOTS)]
    rows.append((rng.choice(ENDINGS)[column], {}))

    def gendered(match: re.Match[str]) -> str:
        return match[3] if genders["hf".index(match[1])] else match[2]

    sentences = []
    for template, extra in rows:
        text = re.sub(r"\{([hf]):([^|}]*)\|([^}]*)\}", gendered, template).format(**slots, **extra)
        start = 1 if text[0] in '«„"' else 0
        start += text[start] in " ¿¡"
        sentences.append(text[:start] + text[start : start + 1].upper() + text[start + 1 :])
    text = " ".join(sentences)
    # Names bring their own elisions: "d'Emma" in French, "e Irene" in Spanish.
    if language == "french":
        text = re.sub(r"\bde (?=[AEIO])", "d'", text)
    elif language == "spanish":
        text = text.replace(" y I", " e I")
    return text
