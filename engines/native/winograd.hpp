// The two transforms of a 3x3 convolution by Winograd's minimal filtering (export/rewrites/winograd.py has the whole and
// the matrices): of inputs, B^T d B, and of outputs, A^T m A. Between them stand (m + 2)^2 matrix products.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.hpp"

namespace smooth_rt {

constexpr int LARGEST_SIDE = 8;

// [rows, columns]
struct Matrix {
    int rows = 0, columns = 0;
    std::vector<float> values;
    float at(int i, int j) const { return values[i * columns + j]; }
};

// to = matrix * from * matrix^T, of vectors; `from` and `to` have rows of LARGEST_SIDE.
inline void both_sides(const Matrix& matrix, const Vec (*from)[LARGEST_SIDE], Vec (*to)[LARGEST_SIDE]) {
    Vec half[LARGEST_SIDE][LARGEST_SIDE];
    for (int i = 0; i < matrix.rows; ++i)
        for (int j = 0; j < matrix.columns; ++j) {
            Vec sum = Vec{};
            for (int k = 0; k < matrix.columns; ++k) sum += matrix.at(i, k) * from[k][j];
            half[i][j] = sum;
        }
    for (int i = 0; i < matrix.rows; ++i)
        for (int j = 0; j < matrix.rows; ++j) {
            Vec sum = Vec{};
            for (int k = 0; k < matrix.columns; ++k) sum += half[i][k] * matrix.at(j, k);
            to[i][j] = sum;
        }
}

// Vectors are read and written whole where that many channels are left, else by parts.
inline Vec load(const float* from, int64_t count) {
    if (count >= LANES) return *(const Vec*)from;
    Vec found = Vec{};
    for (int64_t i = 0; i < count; ++i) found[i] = from[i];
    return found;
}

inline void store(float* to, Vec value, int64_t count) {
    if (count >= LANES) *(Vec*)to = value;
    else for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

// One row of tiles of one picture: `image` is [height, width, channels], each of `cells` [across, channels] of that row.
inline void transform_inputs(const Matrix& matrix, const float* image, int64_t height, int64_t width, int64_t channels,
                             int64_t tile_row, const std::vector<float*>& cells) {
    const int side = matrix.rows, size = side - 2;
    const int64_t across = (width + size - 1) / size;
    for (int64_t x = 0; x < across; ++x)
        for (int64_t c = 0; c < channels; c += LANES) {
            Vec tile[LARGEST_SIDE][LARGEST_SIDE], found[LARGEST_SIDE][LARGEST_SIDE];
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j) {
                    const int64_t row = tile_row * size + i - 1, column = x * size + j - 1;
                    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
                    tile[i][j] = inside ? load(image + (row * width + column) * channels + c, channels - c) : Vec{};
                }
            both_sides(matrix, tile, found);
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j) store(cells[i * side + j] + x * channels + c, found[i][j], channels - c);
        }
}

// The other way about: `image` is written.
inline void transform_outputs(const Matrix& matrix, const std::vector<const float*>& cells, int64_t height,
                              int64_t width, int64_t channels, int64_t tile_row, float* image) {
    const int size = matrix.rows, side = matrix.columns;
    const int64_t across = (width + size - 1) / size;
    for (int64_t x = 0; x < across; ++x)
        for (int64_t c = 0; c < channels; c += LANES) {
            Vec tile[LARGEST_SIDE][LARGEST_SIDE], found[LARGEST_SIDE][LARGEST_SIDE];
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j) tile[i][j] = load(cells[i * side + j] + x * channels + c, channels - c);
            both_sides(matrix, tile, found);
            for (int i = 0; i < size; ++i)
                for (int j = 0; j < size; ++j) {
                    const int64_t row = tile_row * size + i, column = x * size + j;
                    if (row < height && column < width)
                        store(image + (row * width + column) * channels + c, found[i][j], channels - c);
                }
        }
}

}  // namespace smooth_rt
