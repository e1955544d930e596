// The kernels as OpenVINO's operations, of the opset SMOOTH_RT_OPSET, which kernels.py names and counts up when one of them
// takes or means something else. OpenVINO calls `evaluate` with tensors in fp32.

#include <tbb/blocked_range2d.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <memory>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>

#include "attention.hpp"
#include "winograd.hpp"

namespace smooth_rt {

using Tensors = ov::TensorVector;
using Shape = ov::PartialShape;
using Shapes = std::vector<ov::PartialShape>;

// Each operation checks its inputs twice: what is known of them when the graph is opened, and all of it before it reads
// them, since sizes may stay free until then.
Shapes known(const ov::Node& node) {
    Shapes shapes;
    for (const auto& input : node.inputs()) {
        const ov::element::Type type = input.get_element_type();
        OPENVINO_ASSERT(type.is_dynamic() || type.is_real(), node.get_type_name(), " takes floating-point numbers");
        shapes.push_back(input.get_partial_shape());
    }
    return shapes;
}

Shapes given(const Tensors& inputs) {
    Shapes shapes;
    for (const auto& input : inputs) shapes.emplace_back(input.get_shape());
    return shapes;
}

// q [B, L, heads, width], k and v [B, S, heads, width] -> [B, L, heads, width].
class Attention : public ov::op::Op {
public:
    OPENVINO_OP("Attention", SMOOTH_RT_OPSET);

    Attention() = default;
    Attention(const ov::OutputVector& inputs, float scale, bool bf16) : Op(inputs), m_scale(scale), m_bf16(bf16) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        check(known(*this));
        set_output_type(0, get_input_element_type(0), get_input_partial_shape(0));
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Attention>(inputs, m_scale, m_bf16);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("scale", m_scale);
        visitor.on_attribute("bf16", m_bf16);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(Tensors& outputs, const Tensors& inputs) const override {
        check(given(inputs));
        const ov::Shape q = inputs[0].get_shape(), k = inputs[1].get_shape();
        outputs[0].set_shape(q);
        const auto of = [](size_t size) { return static_cast<int64_t>(size); };
        const Sizes sizes{of(q[0]), of(q[1]), of(k[1]), of(q[2]), of(q[3])};
        if (m_bf16) run<Half>(outputs[0], inputs, sizes);
        else run<Single>(outputs[0], inputs, sizes);
        return true;
    }

private:
    static void check(const Shapes& shapes) {
        OPENVINO_ASSERT(shapes.size() == 3, "Attention takes q, k and v");
        for (const auto& shape : shapes)
            OPENVINO_ASSERT(shape.rank().compatible(4), "Attention takes [batch, tokens, heads, width]");
        const Shape &q = shapes[0], &k = shapes[1], &v = shapes[2];
        OPENVINO_ASSERT(k.compatible(v), "Attention takes k and v of one shape, not ", k, " and ", v);
        if (q.rank().is_dynamic()) return;
        OPENVINO_ASSERT(q[3].is_dynamic() || q[3].get_length() <= WIDEST, "Attention takes heads of at most ", WIDEST,
                        " numbers");
        Shape like = q;
        like[1] = ov::Dimension::dynamic();
        OPENVINO_ASSERT(k.compatible(like) && v.compatible(like), "Attention takes k and v with the batch, heads and width of q, ",
                        q, ", not ", k);
    }

    template <typename Form>
    void run(ov::Tensor& output, const Tensors& inputs, const Sizes& s) const {
        const float *q = inputs[0].data<float>(), *k = inputs[1].data<float>(), *v = inputs[2].data<float>();
        float* out = output.data<float>();
        const int64_t heads = s.batch * s.heads, each = s.keys_filled() * s.width_filled();
        const float scale = m_scale * 1.4426950408889634f;
        std::unique_ptr<typename Form::Number[]> keys(new typename Form::Number[heads * each]);
        std::unique_ptr<typename Form::Number[]> values(new typename Form::Number[heads * each]);
        tbb::parallel_for(int64_t{0}, heads, [&](int64_t i) {
            pack<Form>(k, v, s, i / s.heads, i % s.heads, &keys[i * each], &values[i * each]);
        });
        const int64_t blocks = (s.queries + QUERIES - 1) / QUERIES;
        tbb::parallel_for(tbb::blocked_range2d<int64_t>(0, heads, 0, blocks), [&](const auto& part) {
            for (int64_t i = part.rows().begin(); i < part.rows().end(); ++i)
                for (int64_t block = part.cols().begin(); block < part.cols().end(); ++block)
                    attend<Form>(q, &keys[i * each], &values[i * each], out, s, i / s.heads, i % s.heads,
                                 block * QUERIES, scale);
        });
    }

    float m_scale = 1.0f;
    bool m_bf16 = false;
};

constexpr int64_t LARGEST_PICTURE = 1 << 20;  // a side, far from where products of sizes overflow

// What both transforms are given: a matrix, and the height and width of the picture.
class Transform : public ov::op::Op {
public:
    OPENVINO_OP("Transform", SMOOTH_RT_OPSET);

    Transform() = default;
    Transform(const ov::OutputVector& inputs, std::vector<float> matrix, int64_t rows, int64_t height, int64_t width)
        : Op(inputs), m_matrix(std::move(matrix)), m_rows(rows), m_height(height), m_width(width) {}

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("matrix", m_matrix);
        visitor.on_attribute("rows", m_rows);
        visitor.on_attribute("height", m_height);
        visitor.on_attribute("width", m_width);
        return true;
    }

    bool has_evaluate() const override { return true; }

protected:
    Matrix matrix() const {
        OPENVINO_ASSERT(m_rows > 0 && !m_matrix.empty() && m_matrix.size() % m_rows == 0, "matrix is not of ", m_rows,
                        " rows");
        const size_t columns = m_matrix.size() / m_rows;
        OPENVINO_ASSERT(m_rows <= LARGEST_SIDE && columns <= LARGEST_SIDE, "tiles of at most ", LARGEST_SIDE);
        OPENVINO_ASSERT(m_height > 0 && m_width > 0 && std::max(m_height, m_width) <= LARGEST_PICTURE, "a picture of ",
                        m_height, "x", m_width, " is not taken");
        return {static_cast<int>(m_rows), static_cast<int>(columns), m_matrix};
    }

    // The tiles that cover one side of the picture, each with `size` numbers of the result.
    static int64_t tiles(int64_t side, int64_t size) { return (side + size - 1) / size; }

    std::vector<float> m_matrix;
    int64_t m_rows = 0, m_height = 0, m_width = 0;
};

// [N, C, height, width] -> side * side of [N, down, across, C]; the matrix is B^T [side, side].
class WinogradInput : public Transform {
public:
    OPENVINO_OP("WinogradInput", SMOOTH_RT_OPSET, Transform);

    WinogradInput() = default;
    WinogradInput(const ov::OutputVector& inputs, std::vector<float> matrix, int64_t rows, int64_t height, int64_t width)
        : Transform(inputs, std::move(matrix), rows, height, width) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const int64_t size = check(known(*this)).rows - 2;
        const Shape& shape = get_input_partial_shape(0);
        const Shape cells{shape[0], tiles(m_height, size), tiles(m_width, size), shape[1]};
        set_output_size(m_rows * m_rows);
        for (int64_t i = 0; i < m_rows * m_rows; ++i) set_output_type(i, get_input_element_type(0), cells);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<WinogradInput>(inputs, m_matrix, m_rows, m_height, m_width);
    }

    bool evaluate(Tensors& outputs, const Tensors& inputs) const override {
        const Matrix by = check(given(inputs));
        const ov::Shape shape = inputs[0].get_shape();
        const int64_t pictures = shape[0], channels = shape[1], size = by.rows - 2;
        const int64_t down = tiles(m_height, size), across = tiles(m_width, size);
        const ov::Shape cells{shape[0], static_cast<size_t>(down), static_cast<size_t>(across), shape[1]};
        for (auto& output : outputs) output.set_shape(cells);
        const float* images = inputs[0].data<float>();
        std::vector<float*> starts;
        for (auto& output : outputs) starts.push_back(output.data<float>());
        tbb::parallel_for(int64_t{0}, pictures * down, [&](int64_t line) {
            std::vector<float*> rows = starts;
            for (auto& row : rows) row += line * across * channels;
            transform_inputs(by, images + line / down * m_height * m_width * channels, m_height, m_width, channels,
                             line % down, rows);
        });
        return true;
    }

private:
    Matrix check(const Shapes& shapes) const {
        const Matrix by = matrix();
        OPENVINO_ASSERT(by.rows == by.columns && by.rows > 2, "WinogradInput takes a square matrix of 3 rows or more, not ",
                        by.rows, "x", by.columns);
        const Shape picture{-1, -1, m_height, m_width};
        OPENVINO_ASSERT(shapes.size() == 1 && shapes[0].rank().is_static() && shapes[0].compatible(picture),
                        "WinogradInput takes one picture ", picture, ", not ", shapes.empty() ? Shape{} : shapes[0]);
        return by;
    }
};

// side * side of [N, down, across, C] -> [N, C, height, width]; the matrix is A^T [size, side].
class WinogradOutput : public Transform {
public:
    OPENVINO_OP("WinogradOutput", SMOOTH_RT_OPSET, Transform);

    WinogradOutput() = default;
    WinogradOutput(const ov::OutputVector& inputs, std::vector<float> matrix, int64_t rows, int64_t height, int64_t width)
        : Transform(inputs, std::move(matrix), rows, height, width) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        check(known(*this));
        const Shape& shape = get_input_partial_shape(0);
        set_output_type(0, get_input_element_type(0), Shape{shape[0], shape[3], m_height, m_width});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<WinogradOutput>(inputs, m_matrix, m_rows, m_height, m_width);
    }

    bool evaluate(Tensors& outputs, const Tensors& inputs) const override {
        const Matrix by = check(given(inputs));
        const ov::Shape shape = inputs[0].get_shape();
        const int64_t pictures = shape[0], down = shape[1], across = shape[2], channels = shape[3];
        outputs[0].set_shape({shape[0], shape[3], static_cast<size_t>(m_height), static_cast<size_t>(m_width)});
        float* images = outputs[0].data<float>();
        tbb::parallel_for(int64_t{0}, pictures * down, [&](int64_t line) {
            std::vector<const float*> rows;
            for (const auto& input : inputs) rows.push_back(input.data<const float>() + line * across * channels);
            transform_outputs(by, rows, m_height, m_width, channels, line % down,
                              images + line / down * m_height * m_width * channels);
        });
        return true;
    }

private:
    Matrix check(const Shapes& shapes) const {
        const Matrix by = matrix();
        OPENVINO_ASSERT(by.columns == by.rows + 2, "WinogradOutput takes a matrix with 2 columns more than rows, not ",
                        by.rows, "x", by.columns);
        OPENVINO_ASSERT(shapes.size() == static_cast<size_t>(by.columns * by.columns),
                        "WinogradOutput takes one input a cell of a tile");
        Shape cells{-1, tiles(m_height, by.rows), tiles(m_width, by.rows), -1};
        for (const auto& shape : shapes)
            OPENVINO_ASSERT(shape.rank().is_static() && Shape::merge_into(cells, shape),
                            "WinogradOutput takes tiles ", cells, " each, not ", shape);
        return by;
    }
};

}  // namespace smooth_rt

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<smooth_rt::Attention>>(),
    std::make_shared<ov::OpExtension<smooth_rt::WinogradInput>>(),
    std::make_shared<ov::OpExtension<smooth_rt::WinogradOutput>>(),
}));
