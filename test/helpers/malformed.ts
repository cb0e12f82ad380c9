// Safetensors files that break the format, each in one way. Every one must be refused.

const MAX_HEADER = 100_000_000;

/** Length, header and data as one file. */
export function file(header: string | Buffer | object, data = Buffer.alloc(0), length?: bigint): Buffer {
  const text = Buffer.isBuffer(header)
    ? header
    : Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(length ?? BigInt(text.length));
  return Buffer.concat([prefix, text, data]);
}

const data = (bytes: number) => Buffer.alloc(bytes, 7);
const tensor = (shape: unknown, from: unknown, to: unknown, dtype: unknown = 'BF16') => ({
  dtype,
  shape,
  data_offsets: [from, to],
});
/** A header text whose tensor `a` has `field` replaced by JSON that JSON.stringify would not write. */
const raw = (dtype: string, shape: string, offsets: string) =>
  `{"a":{"dtype":${dtype},"shape":${shape},"data_offsets":${offsets}}}`;
const good = tensor([2], 0, 4);

export const MALFORMED: readonly [what: string, bytes: Buffer, reason: RegExp][] = [
  ['no bytes', Buffer.alloc(0), /too few/],
  ['half a length', Buffer.alloc(7), /too few/],
  ['a length and nothing else', file('', data(0), 2n), /does not fit/],
  ['a header of zero bytes', file(''), /start with/],
  ['a header longer than the file', file('{}', data(0), 3n), /does not fit/],
  ['a header above the limit', file('{}', data(0), BigInt(MAX_HEADER) + 1n), /limit/],
  ['a header length of 2^63', file('{}', data(0), 2n ** 63n), /limit/],
  ['a header length of 2^64 - 1', file('{}', data(0), 2n ** 64n - 1n), /limit/],
  ['a header that starts with a space', file(' {}'), /start with/],
  [
    'a byte order mark',
    file(Buffer.concat([Buffer.from([0xef, 0xbb, 0xbf]), Buffer.from('{}')])),
    /start with/,
  ],
  ['a list for a header', file('[]'), /start with/],
  ['JSON that is cut off', file('{"a":{"dtype":"BF16"'), /JSON/],
  ['text after the JSON', file('{} {}'), /JSON/],
  ['zeros after the JSON', file('{}\0\0'), /JSON/],
  ['a trailing comma', file('{"a":1,}'), /JSON/],
  [
    'bytes that are not UTF-8',
    file(Buffer.from([0x7b, 0x22, 0xff, 0xfe, 0x22, 0x3a, 0x31, 0x7d])),
    /not valid|JSON/,
  ],
  ['an overlong UTF-8 sequence', file(Buffer.from([0x7b, 0x22, 0xc0, 0x80, 0x22, 0x3a, 0x31, 0x7d])), /JSON/],
  [
    'a name twice',
    file(`{"a":${JSON.stringify(good)},"a":${JSON.stringify(tensor([2], 4, 8))}}`, data(8)),
    /twice/,
  ],
  [
    'a name twice by an escape',
    file(`{"a":${JSON.stringify(good)},"\\u0061":${JSON.stringify(tensor([2], 4, 8))}}`, data(8)),
    /twice/,
  ],
  [
    'a field twice',
    file('{"a":{"dtype":"BF16","shape":[2],"shape":[1],"data_offsets":[0,4]}}', data(4)),
    /twice/,
  ],
  ['__metadata__ twice', file('{"__metadata__":{},"__metadata__":{}}'), /twice/],
  ['deep nesting', file(`{"a":${'['.repeat(50_000)}${']'.repeat(50_000)}}`), /nested/],
  ['metadata that is a list', file({ __metadata__: [] }), /__metadata__/],
  ['metadata that is null', file('{"__metadata__":null}'), /__metadata__/],
  ['metadata with a number', file({ __metadata__: { format: 1 } }), /__metadata__/],
  ['metadata with an object', file({ __metadata__: { a: {} } }), /__metadata__/],
  ['an entry that is null', file({ a: null }), /not an object/],
  ['an entry that is a number', file({ a: 4 }), /not an object/],
  ['an unknown field', file({ a: { ...good, strides: [1] } }, data(4)), /unknown field "strides"/],
  ['a missing dtype', file({ a: { shape: [2], data_offsets: [0, 4] } }, data(4)), /dtype/],
  ['an unknown dtype', file({ a: tensor([2], 0, 4, 'BF17') }, data(4)), /dtype "BF17"/],
  ['a dtype in small letters', file({ a: tensor([2], 0, 4, 'bf16') }, data(4)), /dtype/],
  ['a dtype that is a name of every object', file({ a: tensor([2], 0, 4, 'toString') }, data(4)), /dtype/],
  ['a dtype that is a list', file({ a: tensor([2], 0, 4, ['BF16']) }, data(4)), /dtype/],
  ['a missing shape', file({ a: { dtype: 'BF16', data_offsets: [0, 4] } }, data(4)), /shape/],
  ['a shape that is a number', file({ a: tensor(2, 0, 4) }, data(4)), /shape/],
  ['a negative axis', file({ a: tensor([-2], 0, 4) }, data(4)), /shape/],
  ['two negative axes', file({ a: tensor([-1, -2], 0, 4) }, data(4)), /shape/],
  ['a fraction of an axis', file({ a: tensor([1.5], 0, 3) }, data(3)), /shape/],
  ['an axis of minus zero', file(raw('"BF16"', '[-0]', '[0,0]')), /shape/],
  ['an axis that is text', file({ a: tensor(['2'], 0, 4) }, data(4)), /shape/],
  ['an axis that is null (NaN)', file({ a: tensor([Number.NaN], 0, 4) }, data(4)), /shape/],
  ['an axis that is the word NaN', file(raw('"BF16"', '[NaN]', '[0,0]')), /JSON/],
  ['an axis beyond exact integers', file(raw('"BF16"', '[9007199254740993]', '[0,4]'), data(4)), /shape/],
  ['an axis of infinity', file(raw('"BF16"', '[1e999]', '[0,4]'), data(4)), /shape/],
  [
    'a shape that overflows 64 bits to its size',
    file(raw('"BF16"', '[4294967296,4294967296,2]', '[0,0]')),
    /overflows/,
  ],
  [
    'a shape that overflows exact integers',
    file({ a: tensor([2 ** 40, 2 ** 40], 0, 4) }, data(4)),
    /overflows/,
  ],
  ['too many axes', file({ a: tensor(Array(17).fill(1), 0, 2) }, data(2)), /shape/],
  ['missing offsets', file({ a: { dtype: 'BF16', shape: [2] } }, data(4)), /data_offsets/],
  ['one offset', file({ a: { ...good, data_offsets: [0] } }, data(4)), /data_offsets/],
  ['three offsets', file({ a: { ...good, data_offsets: [0, 4, 4] } }, data(4)), /data_offsets/],
  ['a negative offset', file({ a: tensor([2], -4, 0) }, data(4)), /data_offsets/],
  ['a fraction of an offset', file({ a: tensor([2], 0.5, 4.5) }, data(5)), /data_offsets/],
  ['an offset that is null (NaN)', file({ a: tensor([2], Number.NaN, 4) }, data(4)), /data_offsets/],
  ['an offset that is true', file({ a: tensor([2], false, 4) }, data(4)), /data_offsets/],
  ['an offset of 1e400', file(raw('"BF16"', '[2]', '[0,1e400]'), data(4)), /data_offsets/],
  ['offsets the wrong way round', file({ a: tensor([2], 4, 0) }, data(4)), /takes 4 bytes/],
  ['a span that is too long', file({ a: tensor([2], 0, 6) }, data(6)), /takes 4 bytes/],
  ['a span that is too short', file({ a: tensor([2], 0, 2) }, data(2)), /takes 4 bytes/],
  ['a tensor past the end', file({ a: tensor([4], 0, 8) }, data(4)), /end at byte/],
  ['data that is cut off', file({ a: good }, data(3)), /end at byte/],
  ['bytes after the last tensor', file({ a: good }, data(5)), /end at byte/],
  ['data without tensors', file({}, data(4)), /end at byte/],
  ['a hole at the start', file({ a: tensor([2], 4, 8) }, data(8)), /hole/],
  ['a hole in the middle', file({ a: good, b: tensor([2], 8, 12) }, data(12)), /hole/],
  ['tensors that overlap', file({ a: good, b: tensor([2], 2, 6) }, data(6)), /overlap/],
  ['two tensors in one place', file({ a: good, b: good }, data(4)), /overlap/],
  ['a tensor inside another', file({ a: tensor([4], 0, 8), b: tensor([1], 2, 4) }, data(8)), /overlap/],
  ['an empty tensor', file({ a: tensor([0], 0, 0) }), /empty/],
  ['an empty tensor that shares an offset', file({ a: good, b: tensor([0, 5], 0, 0) }, data(4)), /empty/],
  ['an empty tensor that hides an overflow', file({ a: tensor([2 ** 52, 2 ** 52, 0], 0, 0) }), /overflows/],
  [
    'too many tensors',
    file(Object.fromEntries(Array.from({ length: 100_001 }, (_, i) => [`t${i}`, 0]))),
    /100001 tensors/,
  ],
];
