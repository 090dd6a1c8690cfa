"""Words, names and numbers to make texts of, drawn without repetition."""

import re
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from evals.tiny.lexicon import ADJECTIVES, NOUNS, VERBS


def listed(text: str) -> list[str]:
    """Return the parts of a text between its commas."""
    return [part.strip() for part in text.split(",")]


CONSONANTS = listed("b,br,d,dr,f,g,gl,h,k,kr,l,m,n,p,pl,r,s,st,t,tr,v,w")
VOWELS, ENDINGS = listed("a,e,i,o,u,ai,ea,ou"), listed("l,m,n,r,s,th,nd,rk,lm,st")

MORE_ADJECTIVES = listed(
    "amber,ashen,awkward,bitter,blank,bleak,bold,brief,brisk,brittle,calm,chilly,civil,coarse,copper,crooked,curly,"
    "damp,dense,dim,dull,eager,elder,even,faint,fair,famous,fancy,fertile,firm,flat,fond,frail,frozen,gaunt,giant,"
    "glad,grand,grave,happy,harsh,hollow,icy,idle,ivory,jolly,keen,lame,lean,level,lively,lone,loose,mellow,merry,"
    "mild,misty,muddy,mute,neat,noble,odd,pale,polite,proper,purple,quaint,ragged,rapid,rigid,ripe,round,scarlet,"
    "shady,shiny,silent,sleek,slim,sly,solid,spare,stark,steady,steep,stern,stout,sturdy,subtle,sunny,swift,tame,"
    "tender,thick,thin,tidy,timid,tiny,upper,vague,vast,violet,vivid,weary,wild,wise,witty,woolen,worn,young,zesty"
)
MORE_NOUNS = listed(
    "acorn,anchor,anvil,arrow,attic,badge,barrel,basin,beacon,beard,bench,berry,blade,bonnet,branch,brick,brook,"
    "brush,bucket,buckle,button,cabin,cable,camel,canal,canoe,canvas,card,cave,cedar,cellar,chapel,chest,cliff,"
    "cloak,cloud,clover,comb,compass,coral,cottage,cradle,crane,creek,crow,cup,curtain,dagger,desk,diary,dish,dome,"
    "dragon,drawer,duck,engine,falcon,feather,fence,fern,ferry,fiddle,flag,flask,fork,fountain,frame,gate,goose,"
    "grape,hall,hare,harp,hay,hedge,helmet,heron,hill,hinge,hook,horn,hut,inkwell,ivy,jar,jewel,kettle,key,kite,"
    "knot,ladle,lake,lamp,lark,leaf,lemon,lily,lock,loom,mask,mast,melon,mitten,moss,moth,mouse,nest,nut,oak,oar,"
    "olive,orchard,otter,oven,oyster,paddle,pan,path,pearl,pebble,pen,pillow,pipe,plank,plow,pond,pot,purse,quill,"
    "quilt,rail,raven,reed,ribbon,robe,rod,roof,root,rose,rug,sack,saddle,sail,saw,scale,shell,ship,shovel,sickle,"
    "sled,slipper,spade,spear,spoon,stable,stool,stove,straw,string,swan,thimble,thread,throne,tile,torch,trunk,"
    "trumpet,tulip,tunnel,turtle,vase,veil,vine,violin,wall,walnut,wasp,wheel,whistle,willow,wing,wreath,yard"
)
adjectives = sorted({*ADJECTIVES.split(), *MORE_ADJECTIVES})
nouns = sorted({*NOUNS.split(), *MORE_NOUNS})
# Plain words first, then thousands that are put together of two nouns.
plain_words = sorted({*adjectives, *nouns, *VERBS.split()})
compounds = [first + second for first in nouns for second in nouns if first != second]


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Return one of the words."""
    return words[int(rng.integers(len(words)))]


def distinct(rng: np.random.Generator, make: Callable[[np.random.Generator], str], n: int) -> list[str]:
    """Return `n` different things of a kind, in the order in which they were made.

    Raises:
        ValueError: There are not so many, or hardly so many.
    """
    made: dict[str, None] = {}
    for _ in range(20 * n):
        if len(made) == n:
            break
        made[make(rng)] = None
    if len(made) < n:
        raise ValueError(f"{n} different things are wanted, of {20 * n} made only {len(made)} differ: ask for less")
    return list(made)


def word_pair(rng: np.random.Generator) -> str:
    """Return an adjective and a noun, like `quiet-harbor`."""
    return f"{pick(rng, adjectives)}-{pick(rng, nouns)}"


def number(rng: np.random.Generator, digits: int = 7) -> str:
    """Return a number of this many digits, which does not begin with 0."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def uuid4(rng: np.random.Generator) -> str:
    """Return a UUID."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def letters(rng: np.random.Generator, n: int, alphabet: str) -> str:
    """Return a word of `n` letters that means nothing."""
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=n))


def proper_name(rng: np.random.Generator) -> str:
    """Return an invented name of two syllables, like `Braimoth`."""
    first, second = (pick(rng, CONSONANTS) + pick(rng, VOWELS) for _ in range(2))
    return (first + second + pick(rng, ENDINGS)).capitalize()


def listed_words(rng: np.random.Generator, n: int) -> list[str]:
    """Return `n` different English words or compounds of them.

    Raises:
        ValueError: There are fewer.
    """
    words = plain_words if n <= len(plain_words) else plain_words + compounds
    if n > len(words):
        raise ValueError(f"{n} different words are wanted, there are {len(words)}: ask for a shorter length")
    return [words[i] for i in rng.permutation(len(words))[:n]]


def with_articles(text: str) -> str:
    """Return the text with "an" before vowels."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
